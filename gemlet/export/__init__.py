"""What a model's folder becomes for other tools: one file a form, each a function from a folder to files."""
