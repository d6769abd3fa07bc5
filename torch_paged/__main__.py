"""`python -m torch_paged`."""

from torch_paged.cli.main import main

raise SystemExit(main())
