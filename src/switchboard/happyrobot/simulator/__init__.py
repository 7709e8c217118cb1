"""A stand-in for HappyRobot: its hook, its Platform API and its callbacks, in one ASGI app.

For tests, `switchboard simulate` and the demo. It keeps everything in memory, and imports nothing from the
rest of Switchboard: what the two know of each other went over the wire.
"""

from switchboard.happyrobot.simulator.api import ApiRequest
from switchboard.happyrobot.simulator.app import Simulator, create_app
from switchboard.happyrobot.simulator.decisions import Decision
from switchboard.happyrobot.simulator.faults import Faults
from switchboard.happyrobot.simulator.hook import Call
from switchboard.happyrobot.simulator.records import Shape
from switchboard.happyrobot.simulator.run import Run

__all__ = ["ApiRequest", "Call", "Decision", "Faults", "Run", "Shape", "Simulator", "create_app"]
