"""hvctl: virtual machines and containers on your own Linux host, from one image, through one set of verbs."""

__version__ = "0.1.0"
