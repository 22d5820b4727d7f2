# SPDX-License-Identifier: Apache-2.0
"""Changes to vLLM's own code, each with a record of what it touches, why, and when it can go.

    signature.py      what "unchanged" means: one signature text, read from a live object or from source
    record.py         PatchRecord, Symbol
    registry.py       all records; applying one; selecting by feature and process
    check.py          the static check against an installed, unpacked or newer vLLM
    <area>.py         one file per area of vLLM: the records' apply functions

README.md is the index for readers; a test keeps it equal to registry.RECORDS.
"""
