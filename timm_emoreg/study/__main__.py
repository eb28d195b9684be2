"""``python -m timm_emoreg.study``."""
import sys

from .command import main

sys.exit(main())
