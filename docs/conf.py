"""Configuration of Sphinx; the pages of the rules are written by `rule_pages.py` at each build."""

import os
import sys
from pathlib import Path

import fusedopt

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

project = "fusedopt"
author = "the authors of fusedopt"
version = release = fusedopt.__version__

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "numpydoc",
    "myst_parser",
]
myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3
exclude_patterns = ["_build"]
default_role = "code"
nitpicky = True

autodoc_typehints = "none"  # docstrings name the types
autodoc_preserve_defaults = True
autosummary_generate = True
numpydoc_show_class_members = False
numpydoc_class_members_toctree = False

html_theme = "pydata_sphinx_theme"
html_title = "fusedopt"
html_theme_options = {"navigation_with_keys": False, "show_nav_level": 2}
if "GITHUB_REPOSITORY" in os.environ:  # where a workflow builds the documentation
    address = "{GITHUB_SERVER_URL}/{GITHUB_REPOSITORY}".format(**os.environ)
    html_theme_options["github_url"] = address
html_show_sourcelink = False


def setup(app: object) -> None:
    """Write the pages of the rules before Sphinx looks for pages."""
    import rule_pages

    app.connect("builder-inited", lambda _: rule_pages.write(HERE / "rules" / "generated"))
