"""What took far longer than usual is told of, with who was busy; anything else is not."""

from motley.train.slow_step import SlowStepWatch


def test_a_worker_that_was_paused_is_named():
    pace = SlowStepWatch()
    assert [pace.remark("step", seconds, "worker", [0.1, 0.1]) for seconds in (5.0, 0.1, 0.1, 0.12)] == [None] * 4
    assert pace.remark("step", 3.4, "worker", [0.1, 3.4]) == (
        "this step took 3.4 s, usually it takes 0.11 s; busy or stopped meanwhile: worker 1 for 3.4 s"
    )
    assert pace.remark("step", 3.4, "worker", [0.1, 0.1]) == (
        "this step took 3.4 s, usually it takes 0.12 s; all of them waited: one was stopped, or a message was under "
        "way for long"
    )


def test_each_thing_has_its_own_pace_and_the_first_two_of_it_say_nothing():
    pace = SlowStepWatch()
    assert [pace.remark("step", seconds) for seconds in (0.1, 3.0, 0.1)] == [None] * 3
    assert [pace.remark("checkpoint", seconds) for seconds in (60.0, 60.0)] == [None] * 2
    assert pace.remark("checkpoint", 400.0) == "this checkpoint took 400.0 s, usually it takes 60 s"


def test_what_is_short_or_only_somewhat_longer_is_not_told():
    pace = SlowStepWatch()
    assert [pace.remark("step", seconds) for seconds in (0.01, 0.01, 0.9)] == [None] * 3
    slow = SlowStepWatch()
    assert [slow.remark("step", seconds) for seconds in (10.0, 10.0, 30.0, 49.0)] == [None] * 4
