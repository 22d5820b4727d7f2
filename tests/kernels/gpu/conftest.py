# SPDX-License-Identifier: Apache-2.0
"""Tests of Triton kernels run in its interpreter, which a process has to ask for before it imports triton.

Other tests of a process may have imported it without, so interpreted/ runs in processes of its own: by
test_interpreted.py, or by hand, `TRITON_INTERPRET=1 python -m pytest tests/kernels/gpu/interpreted`.
"""

from __future__ import annotations

import os

collect_ignore = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["interpreted"]
