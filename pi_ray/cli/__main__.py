"""`python -m pi_ray.cli`, where the command `pi-ray` is not at hand."""

import sys

from pi_ray.cli import main

sys.exit(main())
