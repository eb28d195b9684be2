"""``python -m timm_emoreg.hub``."""
import sys

from .command import main

sys.exit(main())
