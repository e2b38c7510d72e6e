// examples/cpp/labels.h as a command: logits, float32, from standard input; labels to standard output.

#include <cstdio>
#include <cstdlib>

#include "labels.h"

int main(int, char** words) {
    int numbers[6];  // rows, columns, classes, height, width, threads
    for (int i = 0; i < 6; ++i) numbers[i] = std::atoi(words[i + 1]);
    const auto [rows, columns, classes, height, width, threads] = numbers;
    std::vector<float> logits(size_t(rows) * columns * classes);
    if (std::fread(logits.data(), 4, logits.size(), stdin) != logits.size()) return 1;
    const auto labels = topformer::find_labels(logits.data(), rows, columns, classes, height, width, threads);
    return std::fwrite(labels.data(), 1, labels.size(), stdout) != labels.size();
}
