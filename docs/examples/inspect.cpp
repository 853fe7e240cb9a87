// Inspects a binary PPM image (P6, 8 bits) with an exported detector of one category, without tiles.
//
//     g++ -std=c++17 -O2 inspect.cpp -I onnxruntime/include -L onnxruntime/lib -lonnxruntime -o inspect
//     ./inspect parts.onnx image.ppm
//
// Requires ONNX Runtime (release archives contain headers and library) and nlohmann/json.
#include <onnxruntime_cxx_api.h>

#include <array>
#include <fstream>
#include <iostream>
#include <nlohmann/json.hpp>
#include <stdexcept>
#include <string>

#include "prepare.hpp"

int main(int argc, char** argv) {
    if (argc != 3) {
        std::cerr << "usage: inspect DETECTOR.onnx IMAGE.ppm\n";
        return 2;
    }
    Ort::Env env(ORT_LOGGING_LEVEL_WARNING, "unflaw");
    Ort::SessionOptions options;
    options.SetIntraOpNumThreads(1);
    Ort::Session session(env, argv[1], options);

    Ort::AllocatorWithDefaultOptions allocator;
    const auto text = session.GetModelMetadata().LookupCustomMetadataMapAllocated("unflaw", allocator);
    if (!text) throw std::runtime_error("not a detector of unflaw");
    const auto metadata = nlohmann::json::parse(text.get());
    const auto& preparation = metadata.at("config").at("preparation");
    if (metadata.contains("categories") || preparation.at("fit") != "stretch" || !preparation.at("tile").is_null() ||
        !preparation.at("roi").is_null())
        throw std::runtime_error("this example does not support categories, padding, tiles and regions of interest");
    const auto& size = preparation.at("size");  // the side of a square, or width and height
    const int across = size.is_array() ? size.at(0) : size, down = size.is_array() ? size.at(1) : size;
    const auto& calibration = metadata.at("calibration");
    const double threshold = calibration.at("threshold");
    const bool few = calibration.value("review_only", false);  // too few good images to call anything defective
    const bool band = !few && calibration.contains("review_threshold") && !calibration.at("review_threshold").is_null();
    const double review = band ? double(calibration.at("review_threshold")) : threshold;

    std::ifstream file(argv[2], std::ios::binary);
    std::string format;
    int width = 0, height = 0, largest = 0;
    file >> format >> width >> height >> largest;
    file.get();
    if (format != "P6" || largest != 255 || width < 1 || height < 1) throw std::runtime_error("not a binary PPM of 8 bits");
    std::vector<uint8_t> rgb(size_t(3) * width * height);
    if (!file.read(reinterpret_cast<char*>(rgb.data()), std::streamsize(rgb.size()))) throw std::runtime_error("too short");
    std::vector<float> pixels = unflaw::prepare(rgb, width, height, across, down);

    const std::array<int64_t, 4> shape{1, 3, down, across};
    const auto memory = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
    const Ort::Value image = Ort::Value::CreateTensor<float>(memory, pixels.data(), pixels.size(), shape.data(), 4);
    const char* inputs[] = {"images"};
    const char* outputs[] = {"score", "map"};
    auto results = session.Run(Ort::RunOptions{}, inputs, &image, 1, outputs, 2);

    const float score = results[0].GetTensorData<float>()[0];
    const float* map = results[1].GetTensorData<float>();  // down × across, row by row
    std::cout << (score > threshold && !few ? "defect" : score > review ? "review" : "good") << ' ' << score << ' '
              << *std::max_element(map, map + size_t(down) * across) << '\n';
}
