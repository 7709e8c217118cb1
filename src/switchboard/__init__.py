"""The backend between an application and HappyRobot's voice agents."""

__version__ = "0.1.0"
