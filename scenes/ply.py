"""Goes once scannet.py imports from folder.py."""
from scenes.folder import fault, read_ply  # noqa: F401
