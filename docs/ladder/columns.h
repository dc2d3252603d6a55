// What is found of the steps on one problem, as text or as a column of a table in Markdown.
#pragma once

#include <cmath>
#include <cstdio>
#include <string>
#include <vector>

namespace {

struct Line {
  const char* step;
  bool left_out;
  double error, rate;  // operations a second; 0 where not timed
};

struct Column {
  std::string title;
  double peak;
  std::vector<Line> lines;
};

inline void print_text(const Column& column) {
  std::printf("%s", column.title.c_str());
  if (column.peak > 0) std::printf(": peak %.1f GFLOP/s", column.peak / 1e9);
  std::printf("\n");
  for (const Line& line : column.lines) {
    if (line.left_out) {
      std::printf("  %-11s left out: this CPU has no dot product of bfloat16\n", line.step);
      continue;
    }
    std::printf("  %-11s error %.1e", line.step, line.error);
    if (column.peak > 0) {
      std::printf("  %7.1f GFLOP/s  %4.0f%% of the peak", line.rate / 1e9,
                  100 * line.rate / column.peak);
    }
    std::printf("\n");
  }
}

inline void print_table(const std::vector<Column>& columns) {
  std::string titles = "| |", rule = "|---|";
  for (const Column& column : columns) {
    titles += " " + column.title + " |";
    rule += "---|";
  }
  std::printf("%s\n%s\n| peak |", titles.c_str(), rule.c_str());
  for (const Column& column : columns) std::printf(" %.0f |", column.peak / 1e9);
  for (size_t s = 0; s < columns[0].lines.size(); ++s) {
    std::printf("\n| %s |", columns[0].lines[s].step);
    for (const Column& column : columns) {
      const double rate = column.lines[s].rate;
      if (column.lines[s].left_out) {
        std::printf(" left out |");
      } else {
        std::printf(" %.*f, %.0f%% |", rate < 1e10 ? 1 : 0, rate / 1e9, 100 * rate / column.peak);
      }
    }
  }
  std::printf("\n\n");
}

}  // namespace
