"""Sphinx builds these pages and the reference from the docstrings: `make docs`. It needs no network."""

from lit_lipschitz import __version__

project = "lit-lipschitz"
release = version = __version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]

nitpicky = True  # a name in a docstring that leads nowhere is a warning, and `make docs` takes warnings as errors
nitpick_ignore_regex = [
    # Other projects' names, and what is no part of the interface.
    (r"py:.*", r"(torch|lightning|collections|argparse|pathlib|typing|nn|L|Tensor|Optimizer|Path|Iterable)\b.*"),
    (r"py:class", r"lit_lipschitz\.controller\..*"),
]
myst_heading_anchors = 3  # as GitHub has them, so that links hold in both places
suppress_warnings = ["myst.header"]  # errors.md has its messages below headings of the third level

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
python_maximum_signature_line_length = 88
napoleon_numpy_docstring = False

linkcheck_timeout = 30
linkcheck_retries = 2

html_theme = "alabaster"
html_theme_options = {
    "description": "Learning rates computed, not tuned",
    "page_width": "68rem",
    "sidebar_width": "15rem",
}
html_copy_source = False
highlight_language = "none"  # of blocks without a name: commands, messages and tables
