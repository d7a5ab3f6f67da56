"""Data before they train anything: what is broken, what is there twice, and what leaks from one split to another."""

from mmformer.check.check import Broken, Checked, check, open_views
from mmformer.check.clean import write_clean
from mmformer.check.page import write_page

__all__ = ["Broken", "Checked", "check", "open_views", "write_clean", "write_page"]
