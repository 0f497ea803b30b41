"""The explorer of trained models: pages that show a model think, served to one's own browser or
written as one file (ebwm_scale/explore.py).

    request.py      what a form, or a command line, asks for
    text_page.py    a prompt: candidates and energies, step by step
    task_page.py    a held-out task: the answer after each step
    frame_page.py   a held-out clip or episode: the next frame step by step, wrong frames, futures
    frame_source.py, frame_request.py, frame_parts.py, frame_actions.py, frame_futures.py
                    what it is made of
    page.py         each as a whole page: a script of its own, and nothing from other hosts
    server.py       the pages over HTTP, for one person on one machine
"""
