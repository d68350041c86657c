"""Settings of the documentation, which `make docs` builds into build/docs."""

from fastmix import __version__

project = "fastmix"
version = release = __version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_heading_anchors = 3
html_theme = "furo"
html_title = f"fastmix {__version__}"
html_show_copyright = False
autodoc_typehints = "none"  # docstrings tell shapes and dtypes
napoleon_numpy_docstring = False
napoleon_use_ivar = True


def setup(app):
    # Docstrings are plain text: [B, I, *spatial] begins no emphasis, |D| is no substitution.
    def escape(app, what, name, obj, options, lines):
        lines[:] = [line.replace("*", "\\*").replace("|", "\\|") for line in lines]

    app.connect("autodoc-process-docstring", escape, priority=900)
