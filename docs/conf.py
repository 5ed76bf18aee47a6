"""The site: `python -m sphinx -W --keep-going docs out/site`. Pages with code are run, and show what they print.

To see the text at once, without running anything: `-D nb_execution_mode=off`.
"""

import os
import sys
from pathlib import Path

import wdjax

sys.path.insert(0, str(Path(__file__).parent / "_ext"))
# What the kernels of the pages inherit: eight emulated devices, as in the tests.
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ.setdefault("JAX_PLATFORMS", "cpu")

project = "wdjax"
author = "the authors of wdjax"
project_copyright = "the authors of wdjax"
version = release = wdjax.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "sphinx_design",
    "docstrings",
    "reference",
]
exclude_patterns = ["_ext"]
nitpicky = True
smartquotes = False  # Quotation marks are code: "init".
toc_object_entries_show_parents = "hide"
# The button copies an example without its prompts and its output.
copybutton_prompt_text = r">>> |\.\.\. "
copybutton_prompt_is_regexp = True

html_theme = "furo"
html_title = f"wdjax {release}"
html_static_path = ["_static"]
html_css_files = ["wdjax.css"]
html_favicon = "_static/favicon.svg"
html_theme_options = {
    "source_repository": "https://github.com/wdjax/wdjax/",
    "source_branch": "main",
    "source_directory": "docs/",
}

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3

nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 300
nb_output_stderr = "warn"
nb_merge_streams = True

autodoc_member_order = "bysource"
