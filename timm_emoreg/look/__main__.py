"""``python -m timm_emoreg.look``."""
import sys

from .command import main

sys.exit(main())
