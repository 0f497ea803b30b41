"""Where the rows of a run are shown beside metrics.jsonl: W&B and TensorBoard.

    metrics.jsonl   1 2 3 4 | 5 6 7         cut to step 4 by the resume, then written on
    a tracker       1 2 3                   holds some rows too many, or some too few

metrics.jsonl is the truth: its rows are written at once and cut exactly. A tracker buffers, uploads
or appends. So at each start it is brought to the same rows first (`catch_up`), and every later row
goes to it once (`log`). What each can do about rows too many is in its own file.
"""

from ebwm_scale.training.tracking.trackers import Tracker, Trackers, check_trackers, flat_row
