"""The report: tables and one HTML page, made from result files alone (no torch, no data).

Importing this package is light; matplotlib and jinja2 are loaded when something is drawn.
"""

from fedmllm.report.arms import is_grid
from fedmllm.report.grid_page import write_figures, write_grid_report
from fedmllm.report.loading import load_results
from fedmllm.report.page import write_report
from fedmllm.report.tables import csv_table, markdown_table, summary_table
from fedmllm.report.write import write_tables

__all__ = [
    "csv_table",
    "is_grid",
    "load_results",
    "markdown_table",
    "summary_table",
    "write_figures",
    "write_grid_report",
    "write_report",
    "write_tables",
]
