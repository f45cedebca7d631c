"""How else the five families can be made tensor parallel: each peer in its best configuration.

Each module has `parallel(model, mesh)`, which changes a model of Transformers in place, and what it
takes to get there: none of the five families runs under a peer without help.
"""
