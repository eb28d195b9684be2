"""Building, checking and publishing weights. The command is ``python -m timm_emoreg.hub``."""
