"""Goes once test_scannet.py imports from test_folder.py."""
from test_folder import DAMAGE, QUICK, damage, grid_mesh, mesh_columns, peak_memory, ply_bytes, scene_or_clear_error  # noqa
