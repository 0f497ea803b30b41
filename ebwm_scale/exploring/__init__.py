"""The explorer of trained models: pages that show a model think, served to one's own browser or
written as one file (ebwm_scale/explore.py).

    request.py      what a form, or a command line, asks for
    text_page.py    a prompt: candidates and energies, step by step
    task_page.py    a held-out task: the answer after each step
    page.py         both as a whole page: a script of its own, and nothing from other hosts
    server.py       the pages over HTTP, for one person on one machine
"""
