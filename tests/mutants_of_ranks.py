"""Mistakes in how ranks talk to each other, for mutants.py: file → (name, text, replacement, tests that notice)."""

FAULTS = "test_faults.py -k 'clear_error and {}'"

MUTANTS = {
    "tpffn_triton/collectives.py": [
        (
            "failed collective not explained",
            "raise _failed(begun, t, error) from error",
            "raise",
            FAULTS.format("gone"),
        ),
    ],
    "tpffn_triton/group_store.py": [
        (
            "silent store waited for",
            "thread.join(seconds)",
            "thread.join()",
            FAULTS.format("stopped"),
        ),
        (
            "absent rank not named",
            "if time.monotonic() - start > self.seconds:",
            "if False:",
            "test_agreement.py -k timeout",
        ),
        (
            "timeout of the default group",
            "return group._get_backend(device).options._timeout.total_seconds()",
            "return store.timeout.total_seconds()",
            "test_agreement.py -k timeout",
        ),
        (
            "texts left in the store",
            "for key in self._undeleted[:-1]:",
            "for key in ():",
            "test_agreement.py -k fill_up",
        ),
        (
            "texts deleted before others have read them",
            "for key in self._undeleted[:-1]:",
            "for key in self._undeleted:",
            "test_agreement.py -k fill_up",
        ),
        ("old notes quoted", "if self._noted:\n", "if False:\n", "test_agreement.py -k disturbs_nothing"),
        (
            "late rank not told that others gave up",
            "if GAVE_UP in facts]",
            "if False]",
            "test_faults.py -k comes_too_late",
        ),
        (
            "first failure hidden by the one that follows from it",
            "if not self._noted:",
            "if True:",
            "test_agreement.py -k first_failure",
        ),
        ("notes not read", 'found.append(f"rank {rank} {self._', 'str(f"rank {rank} {self._', FAULTS.format("raises")),
    ],
    "tpffn_triton/agreement.py": [
        (
            "another length not compared",
            "call = _agreed.get(group), (kind, sizes)",
            "call = _agreed.get(group), (kind, None)",
            "test_agreement.py -k only_what_is_new",
        ),
        (
            "another kind not compared",
            "call = _agreed.get(group), (kind, sizes)",
            "call = _agreed.get(group), (None, sizes)",
            FAULTS.format("shapes"),
        ),
        (
            "what follows not remembered",
            "    agreed.follows[agreed.last] = call\n",
            "",
            "test_agreement.py -k take_turns",
        ),
        (
            "any call that ever followed accepted",
            "agreed.follows[agreed.last] == call and",
            "call in agreed.follows and",
            FAULTS.format("shapes"),
        ),
        (
            "contents of a new kind not compared",
            'facts |= contents(named, ("b2",))',
            "pass",
            FAULTS.format("values"),
        ),
        ("bits of x never compared", '("x", "b2")', '("b2",)', FAULTS.format("values")),
        (
            "bits of dy never compared",
            'digested = ("dy",) if replicated else ()',
            "digested = ()",
            FAULTS.format("values"),
        ),
        ("NaN not looked for", "if not t.isfinite().all():", "if False:", FAULTS.format("values")),
        (
            "rank that rejected a call and goes on",
            "store.post({REJECTED: text})\n        _agreed.pop(group, None)",
            "store.post({REJECTED: text})",
            FAULTS.format("shapes"),
        ),
        (
            "disagreement forgotten by one side",
            "    except Exception:\n        _agreed.pop(group, None)\n",
            "    except Exception:\n",
            "test_distributed.py -k noticed_again",
        ),
    ],
    "tpffn_triton/comparison.py": [
        (
            "replicated bias not compared",
            'own.endswith("linear_fc2.bias")',
            'own.endswith("linear_fc1.gain")',
            FAULTS.format("values"),
        ),
    ],
}
