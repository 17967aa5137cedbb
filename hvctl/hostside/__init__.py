"""Effects that a command line cannot give.

Standard library only, and `hvctl.store`, which is no more than that: this package is also installed beside libvirt's
hooks, outside any virtual environment, and can be sent to another host and run by its `python3`.
"""
