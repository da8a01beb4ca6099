"""``python -m kvcache_core``."""

from kvcache_core.cli import main

main()
