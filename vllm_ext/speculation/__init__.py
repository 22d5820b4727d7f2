# SPDX-License-Identifier: Apache-2.0
"""SmartSpec (arXiv:2406.14066): draft lengths chosen every step so that tokens per second are highest.

    acceptance.py   how likely the next drafts of each request are accepted
    step_time.py    how long a step takes, fitted while serving
    prior.py        the same before serving: fitted to a sweep, and stored
    goodput.py      the lengths with which requests are done soonest
    compiled/       the loops of acceptance and goodput
    probing.py      when drafts are tried although they do not seem to pay
    chooser.py      the best lengths by what is believed of a batch
    pace.py         for how many steps a plan stands
    standing.py     such a plan
    controller.py   all of it together: trim what is verified, choose what is drafted, probe, learn

Nothing here imports vLLM, so a simulator drives the same code as the engine does (bench/speculation).
"""
