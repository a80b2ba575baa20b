"""The explorer: a page on which one asks a model about a picture under several pruning plans.

`python -m eval.explore` starts it (__main__.py). Read state.py (what the address of the page
holds), limits.py (what is refused), pictures.py, asking.py (what happens after a question), then
page.py (the page) and server.py (who may reach it, and what is cleaned up).
"""
