"""Runs that survive a cluster: one job is many attempts at one run folder.

How it fits together: docs/cluster.md.

    job.py          the process in a job's batch step: starts one task per GPU, decides what an end
                    means, requeues
    tasks.py        the tasks of an attempt: srun over a Slurm allocation, or plain processes on one
                    machine
    attempts.py     attempts.jsonl of the run folder, and when to give up
    slurm.py        the few questions to Slurm
    sweep.py        run folders before submission: resolved configuration, code version, readable
                    names
    submission.py   submitit: jobs and job arrays
    status.py       what has become of them

Nothing here imports torch: a login node is enough.
"""
