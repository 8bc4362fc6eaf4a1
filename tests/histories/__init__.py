"""The checker of histories: processes do random things to one region; an oracle says whether all of it is explained.

    make soak SECONDS=3600                    from the project's root; ARGS='--seed 7' repeats a plan of operations
    python -m histories.oracle FILE           judges a history that was saved (in tests/)
    python -m histories.shorten FILE          makes its plan as short as it can be

One run of a plan is an episode.  Data flows one way:

    words.py      what records, values, outcomes look like    log.py        a thread's own file of records
    plan.py       a seed -> who does what, which troubles     steps.py      the life of a thread
    hands.py      stores, loads, changes; a thread            holding.py    leases, locks, freezes
    imaging.py    snapshots, files, restores, dirty pages     loops.py      the async forms
    receiving.py  pipes, datagrams, TLS                       pouring.py    large stores by who is killed
    births.py     forks, second handles, observers            actor.py      a process, its own troubles
    stage.py      what all processes of an episode share      conductor.py  one episode, troubles from outside, its end
    history.py    the logs of an episode as operations        facts.py      what a history says at once
    registers.py  what memory may have held, and when         rights.py     what the map allowed, and when
    images.py     moments of snapshots, dirty pages           holds.py      exclusion, the dead, what may not change
    waits.py      time, outcomes, signals, leftovers          oracle.py     all judgements of one history
    coverage.py   which operations met                        soak.py       episode after episode
    shorten.py    less of a plan

The oracle knows the promises and nothing of the code: it gets logs, and never imports pyshare.
"""
