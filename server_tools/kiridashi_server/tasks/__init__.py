"""Tasks: the format, the packed form, the tasks that are shipped, and honest intervals for accuracy."""

from kiridashi_server.tasks.drawings import Views
from kiridashi_server.tasks.errors import TaskError
from kiridashi_server.tasks.folder import load_task, save_task_folder
from kiridashi_server.tasks.images import Limits
from kiridashi_server.tasks.intervals import Interval, accuracy_interval, paired_difference_interval
from kiridashi_server.tasks.packed import load_packed, pack
from kiridashi_server.tasks.sheet import contact_sheet
from kiridashi_server.tasks.shipped import load_shipped, shipped_names
from kiridashi_server.tasks.splitting import SHARES
from kiridashi_server.tasks.task import SPLITS, Samples, SplitName, Task

__all__ = [
    "SHARES",
    "SPLITS",
    "Interval",
    "Limits",
    "Samples",
    "SplitName",
    "Task",
    "TaskError",
    "Views",
    "accuracy_interval",
    "contact_sheet",
    "load_packed",
    "load_shipped",
    "load_task",
    "pack",
    "paired_difference_interval",
    "save_task_folder",
    "shipped_names",
]
