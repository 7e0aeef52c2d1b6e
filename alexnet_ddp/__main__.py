"""`python -m alexnet_ddp` is the command `alexnet-ddp`."""

import sys

from alexnet_ddp.cli import main

sys.exit(main())
