"""`python -m medsiglip_jax`: the command `medsiglip-jax`."""

import sys

from medsiglip_jax.cli import main

sys.exit(main())
