"""A local web page over the functions of the command line: photos, training, sampling, adapters.

Only server.py, app.py, events.py and the files that end in _tab.py know gradio; the others do without it.
"""
