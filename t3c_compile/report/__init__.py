"""``report``: one self-contained page about an artifact, and the same plots as matplotlib figures."""

from t3c_compile.report.data import Baseline, Report, ReportError, read_report
from t3c_compile.report.page import write_page

__all__ = ["Baseline", "Report", "ReportError", "read_report", "write_page"]
