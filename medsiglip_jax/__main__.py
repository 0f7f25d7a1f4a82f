"""python -m medsiglip_jax.cli"""

import sys

from medsiglip_jax.cli import main

sys.exit(main())
