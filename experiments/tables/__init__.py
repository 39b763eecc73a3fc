"""Tables of the paper: cells of an experiment -> their records -> CSV, LaTeX, Markdown, HTML."""
