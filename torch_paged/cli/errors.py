"""What a command raises when an argument cannot be used: the text is the one line that the user sees."""


class CommandError(Exception): ...
