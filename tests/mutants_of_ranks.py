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
        (
            "rank that comes at the last moment absent",
            "if not absent:  # the last",
            "if False:  # the last",
            "test_agreement.py -k last_moment",
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
            "call = kind, x.shape, chunks,",
            "call = kind, torch.Size(), chunks,",
            "test_agreement.py -k only_what_is_new",
        ),
        (
            "another kind not compared",
            "if call == agreed.expected and",
            "if call[1:] == (agreed.expected or ())[1:] and",
            FAULTS.format("shapes"),
        ),
        (
            "another number of chunks not compared",
            "call = kind, x.shape, chunks,",
            "call = kind, x.shape, 1,",
            "test_agreement.py -k number_of_chunks",
        ),
        (
            "what follows not remembered",
            "    agreed.learn(call)\n",
            "",
            "test_agreement.py -k take_turns",
        ),
        (
            "place that does not know how often a call came in a row",
            "self.run = self.run + 1 if call == self.last else 1",
            "self.run = 1",
            "test_expected_calls.py -k repeats_itself",
        ),
        (
            "place that does not know its number",
            "self.follows[self.last, self.run] = self.follows[self.last, self.run, self.number] = call",
            "self.follows[self.last, self.run] = call",
            "test_expected_calls.py -k repeats_itself",
        ),
        (
            "place that knows its number alone",
            "self.follows[self.last, self.run] = self.follows[self.last, self.run, self.number] = call",
            "self.follows[self.last, self.run, self.number] = call",
            "test_agreement.py -k take_turns",
        ),
        (
            "places without bound",
            "len(agreed.follows) >= MOST_PLACES",
            "False",
            "test_expected_calls.py -k bounded",
        ),
        (
            "rank that forgets alone",
            "any(ANEW in theirs for theirs in ranks)",
            "anew",
            "test_expected_calls.py -k starts_anew",
        ),
        (
            "backwards not counted",
            "agreed.backwards += communicates",
            "agreed.backwards += 0",
            FAULTS.format("goes"),
        ),
        (
            "one backward too many not compared",
            "agreed.backwards == agreed.expected[-1] + 1)",
            "False)",
            FAULTS.format("goes"),
        ),
        (
            "all backwards of a new step compared",
            "agreed.backwards == agreed.expected[-1] + 1)",
            "agreed.backwards > agreed.expected[-1])",
            "test_expected_calls.py -k new_step",
        ),
        (
            "error caught and forgotten",
            "    _state(group).expected = None\n",
            "",
            FAULTS.format("goes"),
        ),
        (
            "finiteness of a slice compared",
            'if "x" not in replicated and not _every_call:',
            "if False:",
            "test_agreement.py -k finiteness",
        ),
        (
            "any call that ever followed accepted",
            "if call == agreed.expected and",
            "if call in agreed.follows.values() and",
            FAULTS.format("shapes"),
        ),
        (
            "contents of a new kind not compared",
            "if _every_call or anew or kind not in agreed.kinds:",
            "if _every_call:",
            FAULTS.format("values"),
        ),
        ("bits of x never compared", 'if _every_call or name != "x"', 'if name != "x"', FAULTS.format("values")),
        (
            "bits of dy never compared",
            'digested = ("dy",) if replicated else ()',
            "digested = ()",
            FAULTS.format("values"),
        ),
        ("NaN not looked for", "if not t.isfinite().all():", "if False:", FAULTS.format("values")),
        (
            "rank that rejected a call and goes on",
            "agreed.expected, agreed.backwards = None, 0",
            "agreed.backwards = 0",
            FAULTS.format("shapes"),
        ),
        (
            "backwards before a rejected call counted for the next",
            "agreed.expected, agreed.backwards = None, 0",
            "agreed.expected = None",
            "test_expected_calls.py -k rejected_by_one",
        ),
        (
            "disagreement forgotten by one side",
            "    agreed.expected = None  # until all have agreed\n",
            "",
            "test_distributed.py -k noticed_again",
        ),
    ],
    "tpffn_triton/functional.py": [
        (
            "checkpointing's early stop reported",
            "return _FFN.apply(*inputs)",
            "return reporting(group, _FFN.apply, *inputs)",
            "test_expected_calls.py -k repeats_itself",
        ),
    ],
    "tpffn_triton/passes.py": [
        (
            "backward that sends nothing counted",
            "not slices, need_x or gather_dy)",
            "not slices, True)",
            "test_expected_calls.py -k left_out",
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
