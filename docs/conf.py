"""Sphinx settings of the Kiridashi documentation."""

from __future__ import annotations

from importlib.metadata import version as installed_version

project = "Kiridashi"
author = "The Kiridashi authors"
copyright = "2026, The Kiridashi authors"
release = installed_version("kiridashi")
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax"]
myst_enable_extensions = ["dollarmath", "colon_fence", "deflist"]
myst_heading_anchors = 3
napoleon_use_ivar = True  # attributes are described once, in the class
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"
autodoc_member_order = "bysource"
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "Kiridashi"
