"""Calls that are answered together: each is settled once, and nobody waits for ever, whoever dies."""

import ctypes
import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from support import PATIENCE_S, Arrivals

from lamella_engine.content_store.together import Together


@pytest.fixture
def arrived(monkeypatch):
    return Arrivals(monkeypatch)


def answer_all(waiting):
    for one in waiting:
        one.answer(one.item)


def test_a_call_that_comes_alone_is_worked_on_by_its_own_thread():
    threads = []

    def work(waiting):
        threads.append(threading.current_thread())
        answer_all(waiting)

    together = Together(work)
    assert [together.call(item) for item in range(3)] == [0, 1, 2]
    assert threads == [threading.current_thread()] * 3


def test_calls_that_come_meanwhile_are_handed_over_together_in_order(arrived):
    seen = []

    def work(waiting):
        seen.append([one.item for one in waiting])
        if len(seen) == 1:
            arrived.until(4)
        answer_all(waiting)

    together = Together(work)
    with ThreadPoolExecutor(4) as threads:
        calls = []
        for item in range(4):
            calls.append(threads.submit(together.call, item))
            arrived.until(item + 1)
        assert [call.result(PATIENCE_S) for call in calls] == [0, 1, 2, 3]
    assert seen == [[0], [1, 2, 3]]


def test_a_call_is_handed_over_again_until_it_is_settled():
    rounds = []

    def work(waiting):
        rounds.append(len(waiting))
        if len(rounds) == 3:
            answer_all(waiting)

    assert Together(work).call("x") == "x"
    assert rounds == [1, 1, 1]


def test_one_call_can_fail_alone(arrived):
    def work(waiting):
        if len(waiting) == 1 and waiting[0].item == 0:
            arrived.until(3)
        for one in waiting:
            if one.item == 1:
                one.fail(KeyError("one"))
            one.answer(one.item)  # it is settled already

    together = Together(work)
    with ThreadPoolExecutor(3) as threads:
        calls = []
        for item in range(3):
            calls.append(threads.submit(together.call, item))
            arrived.until(item + 1)
        assert [calls[0].result(PATIENCE_S), calls[2].result(PATIENCE_S)] == [0, 2]
        with pytest.raises(KeyError, match="one"):
            calls[1].result(PATIENCE_S)


class Death(BaseException):
    """Not an Exception."""


@pytest.mark.parametrize("error", [ValueError, Death])
def test_what_kills_the_leader_is_its_own_and_another_call_leads(error, arrived):
    work_done = []

    def work(waiting):
        work_done.append([one.item for one in waiting])
        if waiting[0].item == 0:
            arrived.until(3)
            raise error
        answer_all(waiting)

    together = Together(work)
    with ThreadPoolExecutor(3) as threads:
        calls = []
        for item in range(3):
            calls.append(threads.submit(together.call, item))
            arrived.until(item + 1)
        with pytest.raises(error):
            calls[0].result(PATIENCE_S)
        assert [call.result(PATIENCE_S) for call in calls[1:]] == [1, 2]
    assert together.call(3) == 3


def test_a_call_that_dies_as_it_comes_to_lead_hands_over(arrived):
    def work(waiting):
        if waiting[0].item == 0:
            arrived.until(3)
            (doomed,) = (thread for thread in threading.enumerate() if thread.name == "doomed")
            assert ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(doomed.ident), ctypes.py_object(Death))
            waiting[0].answer(0)
        else:
            answer_all(waiting)

    together = Together(work)
    died = []

    def doomed():
        try:
            together.call(1)
        except Death:
            died.append(True)

    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(together.call, 0)
        arrived.until(1)
        thread = threading.Thread(target=doomed, name="doomed")
        thread.start()
        arrived.until(2)
        last = threads.submit(together.call, 2)
        assert (first.result(PATIENCE_S), last.result(PATIENCE_S)) == (0, 2)
        thread.join(PATIENCE_S)
    assert died == [True]


def test_many_threads_are_all_answered_and_one_at_a_time_works():
    working = threading.Lock()

    def work(waiting):
        assert working.acquire(blocking=False)
        waiting[0].answer(waiting[0].item)
        waiting[-1].answer(waiting[-1].item)
        working.release()

    together = Together(work)
    with ThreadPoolExecutor(16) as threads:
        assert list(threads.map(together.call, range(2_000))) == list(range(2_000))


def test_a_process_that_is_forked_while_somebody_leads_is_answered():
    entered, go_on = threading.Event(), threading.Event()

    def work(waiting):
        if not entered.is_set():
            entered.set()
            assert go_on.wait(PATIENCE_S)
        for one in waiting:
            one.answer(one.item)

    together = Together(work)
    with ThreadPoolExecutor(1) as threads:
        first = threads.submit(together.call, 1)
        assert entered.wait(PATIENCE_S)
        child = os.fork()
        if not child:
            signal.alarm(20)  # ends a child that waits for ever
            os._exit(together.call(7))
        _, status = os.waitpid(child, 0)
        go_on.set()
        assert first.result(PATIENCE_S) == 1
    assert os.waitstatus_to_exitcode(status) == 7
