"""Parses PTX: kernels with their parameters, registers, variables and instructions, calls inlined."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import PurePath

Location = tuple[str, int]

BYTES = {
    **dict.fromkeys(["b8", "u8", "s8", "pred"], 1),
    **dict.fromkeys(["b16", "u16", "s16", "f16", "bf16"], 2),
    **dict.fromkeys(["b32", "u32", "s32", "f32", "f16x2", "bf16x2", "tf32"], 4),
    **dict.fromkeys(["b64", "u64", "s64", "f64"], 8),
}
_BRACE = re.compile(r"[{}]")
_LABEL_OR_BRACE = re.compile(r"(\{(?!\s*%)|\}|\$?\w+:(?!:))\s*")
_INSTRUCTION = re.compile(r"(?:@(!?)([%$\w]+)\s+)?([\w.:]+)\s*(.*)", re.S)
NAME = re.compile(r"[%$\w.@#]+")
_DECLARATION = re.compile(
    r"\.(param|shared|global|const|local)\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+(?:\.ptr\s*)?"
    r"(?:\.(?:global|const|shared|local)\s*)?(?:\.align\s+\d+\s+)?([%$\w]+)\s*((?:\[\s*\d*\s*\])*)\s*(?:=\s*(.*))?$",
    re.S,
)


class Unsupported(Exception):
    """PTX that the emulator does not model."""


@dataclass(frozen=True)
class Instruction:
    """`opcode.modifiers operands`, executed where the predicate `guard` holds (or does not, where `negated`)."""

    opcode: str
    modifiers: tuple[str, ...]
    operands: tuple[str, ...]
    guard: str = ""
    negated: bool = False
    # Innermost first: the line of an inlined function, then the line that called it.
    locations: tuple[Location, ...] = ()

    def __str__(self) -> str:
        return ".".join((self.opcode, *self.modifiers))

    @property
    def type(self) -> str:
        return self.modifiers[-1]


@dataclass(frozen=True)
class Variable:
    """A variable of the shared, global, constant, local or parameter space; `size` 0 is dynamic shared memory."""

    name: str
    space: str
    align: int
    size: int
    type: str = "b8"
    initial: str = ""


@dataclass
class Kernel:
    """An entry or a function: `parameters` in order, `labels` as indices into `instructions`."""

    name: str
    parameters: list[Variable]
    results: list[Variable] = field(default_factory=list)
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    registers: dict[str, str] = field(default_factory=dict)
    variables: dict[str, Variable] = field(default_factory=dict)
    max_threads: int = 1024

    @property
    def parameter_offsets(self) -> dict[str, int]:
        offsets, end = {}, 0
        for parameter in self.parameters:
            end = -(-end // parameter.align) * parameter.align
            offsets[parameter.name] = end
            end += parameter.size
        return offsets


class Module:
    """The PTX of one translation unit; a kernel is parsed when it is first asked for."""

    def __init__(self, text: str) -> None:
        text = re.sub(r"//[^\n]*", "", text)
        files = re.findall(r'^\s*\.file\s+(\d+)\s+"([^"]*)"', text, re.M)
        self.files = {int(number): PurePath(path).name for number, path in files}
        self.texts, outside = _functions(text)
        found = re.findall(
            r"^\s*(?:\.(?:visible|extern|weak|common)\s+)*(\.(?:shared|global|const)\b[^;]*);", outside, re.M
        )
        self.variables = {variable.name: variable for variable in map(_variable, found)}
        self._parsed: dict[str, Kernel] = {}

    @property
    def kernels(self) -> list[str]:
        return [name for name, match in self.texts.items() if match["kind"] == "entry"]

    def kernel(self, name: str) -> Kernel:
        """Return the kernel or function of this mangled name."""
        if name not in self._parsed:
            match = self.texts[name]
            kernel = Kernel(name, _variables(match["parameters"]), _variables(match["results"]))
            kernel.variables = dict(self.variables)
            if limit := re.search(r"\.(?:maxntid|reqntid)\s+([\d,\s]+)", match["directives"]):
                kernel.max_threads = prod(int(size) for size in limit[1].split(","))
            _Body(self, kernel).parse(match["body"])
            self._parsed[name] = kernel
        return self._parsed[name]


_FUNCTION = re.compile(
    r"^(?:\.(?:visible|weak|extern)\s+)*\.(?P<kind>entry|func)\s+(?:\((?P<results>[^)]*)\)\s*)?(?P<name>[$\w]+)\s*"
    r"\((?P<parameters>[^)]*)\)(?P<directives>[^{;]*)\{",
    re.M,
)


def _functions(text: str) -> tuple[dict[str, dict[str, str]], str]:
    """Return the parts of each function by its name, and the text outside of all."""
    found, outside, end = {}, "", 0
    while match := _FUNCTION.search(text, end):
        outside += text[end : match.start()]
        depth, end = 1, match.end()
        while depth:
            brace = _BRACE.search(text, end)
            if brace is None:
                raise Unsupported(f"{match['name']}: no closing brace")
            depth += 1 if brace[0] == "{" else -1
            end = brace.end()
        found[match["name"]] = match.groupdict("") | {"body": text[match.end() : end - 1]}
    return found, outside + text[end:]


def split(operands: str) -> tuple[str, ...]:
    """Split at the commas that lie outside of brackets."""
    parts, depth, current = [], 0, ""
    for char in operands:
        depth += (char in "{[(") - (char in "}])")
        if char == "," and depth == 0:
            parts.append(current.strip())
            current = ""
        else:
            current += char
    return tuple(part for part in (*parts, current.strip()) if part)


class _Body:
    """Reads the statements of one function; names declared in a `{ }` scope get a suffix of their own."""

    def __init__(self, module: Module, kernel: Kernel) -> None:
        self.module, self.kernel = module, kernel
        self.locations: tuple[Location, ...] = ()
        self.scopes: list[dict[str, str]] = [{}]
        # What the names of each open scope end in, and those that it declared itself.
        self.suffixes, self.declared = [""], [set[str]()]
        self.num_scopes = 0
        self.num_calls = 0

    def parse(self, body: str) -> None:
        # A .loc has no semicolon of its own.
        body = re.sub(r"^\s*(\.loc\s[^\n]*)$", r"\1;", body, flags=re.M)
        for statement in body.split(";"):
            statement = statement.strip()
            while match := _LABEL_OR_BRACE.match(statement):
                self._label_or_brace(match[1])
                statement = statement[match.end() :]
            if statement.startswith("."):
                self._directive(statement)
            elif statement:
                self._instruction(statement)

    def _label_or_brace(self, token: str) -> None:
        if token == "{":
            self.num_scopes += 1
            self.scopes.append(dict(self.scopes[-1]))
            self.suffixes.append(f"#{self.num_scopes}")
            self.declared.append(set())
        elif token == "}":
            for stack in (self.scopes, self.suffixes, self.declared):
                stack.pop()
        elif token[:-1] in self.kernel.labels:
            # Of two scopes, perhaps: labels are not renamed.
            raise Unsupported(f"{self.kernel.name}: label {token[:-1]} is there twice")
        else:
            self.kernel.labels[token[:-1]] = len(self.kernel.instructions)

    def _directive(self, statement: str) -> None:
        if re.match(r"\.loc\s", statement):
            places = re.findall(r"(?:loc|inlined_at)\s+(\d+)\s+(\d+)", statement)
            self.locations = tuple((self.module.files.get(int(file), "?"), int(line)) for file, line in places)
        elif match := re.match(r"\.reg\s+\.(\w+)\s+(.*)", statement, re.S):
            for name in split(match[2]):
                if several := re.match(r"([%$\w]+)<(\d+)>", name):
                    for i in range(int(several[2])):
                        self.kernel.registers[self._declare(f"{several[1]}{i}")] = match[1]
                else:
                    self.kernel.registers[self._declare(name)] = match[1]
        elif re.match(r"\.(param|shared|local|global|const)\b", statement):
            variable = _variable(statement)
            name = self._declare(variable.name)
            self.kernel.variables[name] = replace(variable, name=name)
        elif not statement.startswith((".pragma", ".branchtargets")):
            raise Unsupported(f"{self.kernel.name}: {statement}")

    def _declare(self, name: str) -> str:
        if name in self.declared[-1]:
            raise Unsupported(f"{self.kernel.name}: {name} is declared twice")
        self.declared[-1].add(name)
        if len(self.scopes) == 1:
            return name
        self.scopes[-1][name] = name + self.suffixes[-1]
        return self.scopes[-1][name]

    def _instruction(self, statement: str) -> None:
        match = _INSTRUCTION.fullmatch(statement)
        if match is None:
            raise Unsupported(f"{self.kernel.name}: {statement}")
        negated, guard, opcode, operands = match.groups()
        renamed = self.scopes[-1]
        if renamed:
            operands = NAME.sub(lambda name: renamed.get(name[0], name[0]), operands)
            guard = renamed.get(guard, guard)
        opcode, *modifiers = opcode.split(".")
        instruction = Instruction(
            opcode, tuple(modifiers), split(operands), guard or "", negated == "!", self.locations
        )
        if opcode == "call":
            self._inline(instruction)
        elif opcode in ("ld", "st") and "param" in modifiers and not self._is_kernel_parameter(instruction):
            self._move_argument(instruction)
        else:
            self.kernel.instructions.append(instruction)

    def _is_kernel_parameter(self, i: Instruction) -> bool:
        is_entry = self.module.texts[self.kernel.name]["kind"] == "entry"
        base = NAME.search(i.operands[i.opcode == "ld"])
        # A register holds the address of a kernel's parameter: nothing else has one.
        return is_entry and base is not None and (base[0][0] == "%" or base[0] in self.kernel.parameter_offsets)

    def _move_argument(self, i: Instruction) -> None:
        """Treat each element of a call's arguments and results as a register: `argument@offset`."""
        address, values = (i.operands[1], i.operands[0]) if i.opcode == "ld" else i.operands
        match = re.fullmatch(r"\[([^+\]]+)(?:\+(\d+))?\]", address)
        if match is None:
            raise Unsupported(f"{self.kernel.name}: {i} {address}")
        for n, value in enumerate(split(values[1:-1]) if values.startswith("{") else (values,)):
            register = f"{match[1].strip()}@{int(match[2] or 0) + n * BYTES[i.type]}"
            known = BYTES[self.kernel.registers.setdefault(register, f"b{8 * BYTES[i.type]}")]
            if known != BYTES[i.type]:
                raise Unsupported(f"{self.kernel.name}: {register} of {known} bytes, and of {BYTES[i.type]}")
            operands = (value, register) if i.opcode == "ld" else (register, value)
            self.kernel.instructions.append(replace(i, opcode="mov", modifiers=(i.type,), operands=operands))

    def _inline(self, call: Instruction) -> None:
        """Put the body of the called function in the place of the call, under names of its own."""
        operands = list(call.operands)
        results = split(operands.pop(0)[1:-1]) if operands[0].startswith("(") else ()
        function, arguments = operands[0], split(operands[1][1:-1]) if len(operands) > 1 else ()
        if function not in self.module.texts or call.guard:
            # Of another translation unit, like vprintf, or through a pointer: fails if it is ever reached.
            self.kernel.instructions.append(call)
            return
        called = self.module.kernel(function)
        self.num_calls += 1
        prefix = f"{function}@{self.num_calls}."
        actual = {v.name: name for v, name in zip(called.parameters, arguments, strict=True)}
        actual |= {v.name: name for v, name in zip(called.results, results, strict=True)}
        names = {name: prefix + name for name in (*called.registers, *called.labels)}
        for name in called.registers:
            formal, at, offset = name.partition("@")
            if formal in actual:
                names[name] = actual[formal] + at + offset
        local = {name for name, variable in called.variables.items() if name not in self.module.variables}
        names |= {name: prefix + name for name in local}
        kernel, first = self.kernel, len(self.kernel.instructions)
        kernel.registers |= {names[name]: type for name, type in called.registers.items()}
        for name in local:
            kernel.variables[names[name]] = replace(called.variables[name], name=names[name])
        kernel.labels |= {prefix + label: first + index for label, index in called.labels.items()}
        end = f"{prefix}end"
        for i in called.instructions:
            renamed = tuple(NAME.sub(lambda name: names.get(name[0], name[0]), operand) for operand in i.operands)
            opcode, modifiers = i.opcode, i.modifiers
            if opcode in ("ret", "exit"):
                opcode, modifiers, renamed = "bra", (), (end,)
            guard = names.get(i.guard, i.guard)
            locations = i.locations + call.locations
            kernel.instructions.append(Instruction(opcode, modifiers, renamed, guard, i.negated, locations))
        kernel.labels[end] = len(kernel.instructions)


def _variables(text: str) -> list[Variable]:
    return [_variable(part) for part in split(text)]


def _variable(text: str) -> Variable:
    match = _DECLARATION.match(text.strip())
    if match is None:
        raise Unsupported(f"declaration: {text}")
    space, align, type, name, dimensions, initial = match.groups()
    size = BYTES[type]
    for dimension in re.findall(r"\[\s*(\d*)\s*\]", dimensions):
        size *= int(dimension or 0)
    return Variable(name, space, int(align or BYTES[type]), size, type, (initial or "").strip())
