// Segments a picture by an exported file of logits, in ONNX Runtime, without Python:
//
//   python -m topformer_jax.export --config topformer_t_ade --checkpoint T.pth --output t.onnx --logits --size any
//   c++ -O3 -std=c++17 -pthread segment.cpp -I ORT/include -L ORT/lib -l onnxruntime -Wl,-rpath,ORT/lib -o segment
//   convert street.jpg street.ppm
//   ./segment t.onnx street.ppm street            (writes street_labels.pgm and street_overlay.ppm, prints times)
//
// ORT is the folder of ONNX Runtime's own archive for C and C++. The colours are those in the file.

#include <onnxruntime_c_api.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <stdexcept>
#include <string>

#include "labels.h"

struct Picture {  // RGB, a byte a channel
    int width = 0, height = 0;
    std::vector<uint8_t> pixels;
};

// A binary PPM file (P6, 8 bits), whose header may hold comments.
static Picture read_ppm(const std::string& path) {
    std::ifstream file(path, std::ios::binary);
    std::string magic;
    file >> magic;
    int numbers[3] = {};
    for (int& number : numbers) {
        while ((file >> std::ws) && file.peek() == '#') file.ignore(1 << 20, '\n');
        file >> number;
    }
    const auto [width, height, largest] = numbers;
    if (!file || magic != "P6" || largest != 255 || width < 1 || height < 1)
        throw std::runtime_error(path + " is not a PPM picture of 8 bits: make one with convert a.jpg a.ppm");
    file.get();
    Picture picture{width, height, std::vector<uint8_t>(size_t(3) * width * height)};
    if (!file.read(reinterpret_cast<char*>(picture.pixels.data()), std::streamsize(picture.pixels.size())))
        throw std::runtime_error(path + " ends early");
    return picture;
}

static void write_netpbm(const std::string& path, const char* magic, int width, int height,
                         const std::vector<uint8_t>& bytes) {
    std::ofstream file(path, std::ios::binary);
    file << magic << "\n" << width << " " << height << "\n255\n";
    file.write(reinterpret_cast<const char*>(bytes.data()), std::streamsize(bytes.size()));
    if (!file.flush()) throw std::runtime_error("cannot write " + path);
}

static const OrtApi* ort;

static void check(OrtStatus* status) {
    if (!status) return;
    const std::string message = ort->GetErrorMessage(status);
    ort->ReleaseStatus(status);
    throw std::runtime_error(message);
}

// A file of logits, open in ONNX Runtime; it lives as long as the process.
struct Network {
    OrtSession* session;
    OrtMemoryInfo* memory;
    std::vector<uint8_t> palette;  // RGB of each class

    Network(const std::string& path, int threads) {
        OrtEnv* environment;
        OrtSessionOptions* options;
        check(ort->CreateEnv(ORT_LOGGING_LEVEL_ERROR, "segment", &environment));
        check(ort->CreateSessionOptions(&options));
        check(ort->SetIntraOpNumThreads(options, threads));
        check(ort->CreateSession(environment, path.c_str(), options, &session));
        check(ort->CreateCpuMemoryInfo(OrtArenaAllocator, OrtMemTypeDefault, &memory));
        OrtModelMetadata* metadata;
        OrtAllocator* allocator;
        char* description = nullptr;
        check(ort->SessionGetModelMetadata(session, &metadata));
        check(ort->GetAllocatorWithDefaultOptions(&allocator));
        check(ort->ModelMetadataLookupCustomMetadataMap(metadata, allocator, "topformer_jax", &description));
        // The description is JSON, with "palette": [[120, 120, 120], ...].
        const char* at = description ? std::strstr(description, "\"palette\": [[") : nullptr;
        if (!at || !std::strstr(description, "\"output\": \"logits\""))
            throw std::runtime_error(path + " is not a file of logits: export with --logits");
        for (const char* end = std::strstr(at, "]]"); at && at < end; ++at)
            if (*at >= '0' && *at <= '9') {
                char* after;
                palette.push_back(uint8_t(std::strtol(at, &after, 10)));
                at = after - 1;
            }
    }

    // Logits [rows, columns, classes]; they are gone with `value`.
    OrtValue* run(const Picture& picture, const float*& logits, int64_t (&shape)[4]) const {
        const int64_t input_shape[4] = {1, picture.height, picture.width, 3};
        OrtValue *input, *output = nullptr;
        check(ort->CreateTensorWithDataAsOrtValue(memory, const_cast<uint8_t*>(picture.pixels.data()),
                                                  picture.pixels.size(), input_shape, 4,
                                                  ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8, &input));
        const char *input_name = "images", *output_name = "logits";
        OrtStatus* status = ort->Run(session, nullptr, &input_name, &input, 1, &output_name, 1, &output);
        ort->ReleaseValue(input);
        check(status);
        OrtTensorTypeAndShapeInfo* info;
        void* data;
        check(ort->GetTensorTypeAndShape(output, &info));
        check(ort->GetDimensions(info, shape, 4));
        ort->ReleaseTensorTypeAndShapeInfo(info);
        check(ort->GetTensorMutableData(output, &data));
        logits = static_cast<const float*>(data);
        return output;
    }
};

int main(int count, char** words) try {
    if (count < 4) throw std::runtime_error("usage: segment FILE.onnx PICTURE.ppm OUTPUT [THREADS [REPEATS]]");
    const int threads = count > 4 ? std::atoi(words[4]) : int(std::thread::hardware_concurrency());
    const int repeats = count > 5 ? std::atoi(words[5]) : 10;
    ort = OrtGetApiBase()->GetApi(ORT_API_VERSION);
    if (!ort) throw std::runtime_error("ONNX Runtime's library is older than its header");
    const Picture picture = read_ppm(words[2]);
    const Network network(words[1], threads);

    std::vector<uint8_t> labels;
    std::vector<double> times[2];  // of the network and of the labels, ms
    for (int turn = 0; turn <= repeats; ++turn) {  // the first one warms up
        using Clock = std::chrono::steady_clock;
        const auto start = Clock::now();
        const float* logits;
        int64_t shape[4];
        OrtValue* value = network.run(picture, logits, shape);
        const auto middle = Clock::now();
        labels = topformer::find_labels(logits, int(shape[1]), int(shape[2]), int(shape[3]), picture.height,
                                        picture.width, threads);
        const auto end = Clock::now();
        ort->ReleaseValue(value);
        if (turn == 0 && repeats > 0) continue;
        times[0].push_back(std::chrono::duration<double, std::milli>(middle - start).count());
        times[1].push_back(std::chrono::duration<double, std::milli>(end - middle).count());
    }

    std::vector<uint8_t> overlay(picture.pixels.size());  // half picture, half colour
    for (size_t i = 0; i < overlay.size(); ++i)
        overlay[i] = uint8_t((picture.pixels[i] + network.palette.at(3 * labels[i / 3] + i % 3) + 1) / 2);
    const std::string output = words[3];
    write_netpbm(output + "_labels.pgm", "P5", picture.width, picture.height, labels);
    write_netpbm(output + "_overlay.ppm", "P6", picture.width, picture.height, overlay);
    for (auto& list : times) std::sort(list.begin(), list.end());
    std::printf("%d x %d, %d threads: network %.1f ms, labels %.1f ms (medians of %zu)\n", picture.width,
                picture.height, threads, times[0][times[0].size() / 2], times[1][times[1].size() / 2], times[0].size());
} catch (const std::exception& error) {
    std::fprintf(stderr, "error: %s\n", error.what());
    return 2;
}
