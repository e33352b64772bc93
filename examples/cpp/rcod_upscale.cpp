// A bundle of rcod from C++: the pixels of the Python runtime, within one grey level.
//
//   rcod_upscale BUNDLE in.ppm out.ppm [fidelity|neutral|realism|0..1]
//
// One file to read and to take over. Everything but `Graphs` is the pipeline around the graphs:
// bicubic upsampling, tokens of the whole photo, overlapping tiles, blending, colours. `Graphs` runs
// one graph, with ONNX Runtime on the CPU or, compiled with -DRCOD_TENSORRT, with the bundle's
// TensorRT engines (unverified: it has not run on a GPU yet). Left to the Python runtime: the
// adaptive level, rcod-s (a bundle with a guide), alpha and 16 bits, scales other than the bundle's.
//
// A bundle is trusted here as a program is: check it when it is installed, with
// `rcod-export verify BUNDLE` or `rcod-doctor --bundle BUNDLE --require-signature KEY`.
//
// Exit codes: 0 written, 1 anything else; the reason goes to stderr.

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <functional>
#include <iostream>
#include <map>
#include <numeric>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include <nlohmann/json.hpp>

#ifdef RCOD_TENSORRT
#include <NvInferRuntime.h>
#include <cuda_runtime_api.h>
#include <memory>
#else
#include <onnxruntime_cxx_api.h>
#endif

namespace fs = std::filesystem;
using Json = nlohmann::json;
using Shape = std::vector<int64_t>;

struct Tensor {
    Shape shape;
    std::vector<float> values;  // C order
};
using Tensors = std::map<std::string, Tensor>;

size_t count(const Shape& shape) {
    return std::accumulate(shape.begin(), shape.end(), size_t{1}, std::multiplies<size_t>());
}

// -- graphs ---------------------------------------------------------------------------------------

#ifndef RCOD_TENSORRT

// The bundle's ONNX graphs on the CPU.
constexpr uintmax_t kLargeGraphBytes = uintmax_t(1) << 30;

class Graphs {
public:
    Graphs(const fs::path& bundle, const Json& manifest) {
        for (const auto& [name, graph] : manifest.at("graphs").items()) {
            const fs::path file = bundle / graph.at("file").get<std::string>();
            uintmax_t bytes = fs::file_size(file);
            for (const auto& [data, sha256] : graph.at("data_files").items())
                bytes += fs::file_size(bundle / data);
            fits_ = fits_ && bytes <= kLargeGraphBytes;
            Ort::SessionOptions options;
            Graph& made = graphs_[name];
            made.session = Ort::Session(environment_, file.c_str(), options);
            for (const auto& output : graph.at("outputs"))
                made.outputs.push_back(output.at("name").get<std::string>());
        }
    }

    // Sides of the only tile the graphs take; 0: any.
    int tile() const { return 0; }
    // Whether smaller tiles are taken where they do: as the Python runtime, not beside large graphs.
    bool fits() const { return fits_; }

    Tensors run(const std::string& name, const Tensors& inputs) {
        Graph& graph = graphs_.at(name);
        const auto memory = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
        std::vector<const char*> inputNames, outputNames;
        std::vector<Ort::Value> values;
        for (const auto& [input, tensor] : inputs) {
            inputNames.push_back(input.c_str());
            // ONNX Runtime takes inputs as mutable memory and does not write to it.
            values.push_back(Ort::Value::CreateTensor<float>(
                memory, const_cast<float*>(tensor.values.data()), tensor.values.size(),
                tensor.shape.data(), tensor.shape.size()));
        }
        for (const std::string& output : graph.outputs) outputNames.push_back(output.c_str());
        const std::vector<Ort::Value> results =
            graph.session.Run(Ort::RunOptions{nullptr}, inputNames.data(), values.data(),
                              values.size(), outputNames.data(), outputNames.size());
        Tensors made;
        for (size_t i = 0; i < results.size(); ++i) {
            const Shape shape = results[i].GetTensorTypeAndShapeInfo().GetShape();
            const float* first = results[i].GetTensorData<float>();
            made[graph.outputs[i]] = {shape, {first, first + count(shape)}};
        }
        return made;
    }

private:
    struct Graph {
        Ort::Session session{nullptr};
        std::vector<std::string> outputs;
    };
    Ort::Env environment_{ORT_LOGGING_LEVEL_WARNING, "rcod"};
    std::map<std::string, Graph> graphs_;
    bool fits_ = true;
};

#else

// What engines are tied to, as the Python runtime names it.
#if defined(_WIN32) && defined(_M_ARM64)
constexpr const char* kSystem = "windows-arm64";
#elif defined(_WIN32)
constexpr const char* kSystem = "windows-amd64";
#elif defined(__aarch64__)
constexpr const char* kSystem = "linux-aarch64";
#else
constexpr const char* kSystem = "linux-x86_64";
#endif

void check(cudaError_t code, const char* call) {
    if (code != cudaSuccess)
        throw std::runtime_error(std::string(call) + ": " + cudaGetErrorString(code));
}

// Memory of the device, freed with the object.
struct DeviceMemory {
    explicit DeviceMemory(size_t bytes) { check(cudaMalloc(&pointer, bytes), "cudaMalloc"); }
    ~DeviceMemory() { cudaFree(pointer); }
    DeviceMemory(const DeviceMemory&) = delete;
    DeviceMemory& operator=(const DeviceMemory&) = delete;
    void* pointer = nullptr;
};

// The bundle's TensorRT engines of this GPU; tensors pass through the host between graphs, which
// the Python runtime spares. UNVERIFIED on a GPU.
class Graphs {
public:
    Graphs(const fs::path& bundle, const Json& manifest) {
        cudaDeviceProp device{};
        check(cudaGetDeviceProperties(&device, 0), "cudaGetDeviceProperties");
        runtime_.reset(nvinfer1::createInferRuntime(logger_));
        if (!runtime_) throw std::runtime_error("TensorRT: no runtime; is the driver installed?");
        for (const auto& [graph, file] : chooseEngines(manifest, device)) load(bundle / file, graph);
        check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "cudaStreamCreate");
    }

    ~Graphs() {
        if (stream_) cudaStreamDestroy(stream_);
    }
    Graphs(const Graphs&) = delete;
    Graphs& operator=(const Graphs&) = delete;

    int tile() const { return tile_; }
    bool fits() const { return false; }

    Tensors run(const std::string& name, const Tensors& inputs) {
        Graph& graph = graphs_.at(name);
        std::vector<std::unique_ptr<DeviceMemory>> memory;
        const auto place = [&](const std::string& tensor, size_t bytes) {
            memory.push_back(std::make_unique<DeviceMemory>(bytes));
            if (!graph.context->setTensorAddress(tensor.c_str(), memory.back()->pointer))
                throw std::runtime_error(name + ": TensorRT refuses the tensor " + tensor);
            return memory.back()->pointer;
        };
        for (const auto& [input, tensor] : inputs) {
            const nvinfer1::Dims shape = dims(tensor.shape);
            if (!graph.context->setInputShape(input.c_str(), shape))
                throw std::runtime_error(name + ": TensorRT refuses the shape of " + input);
            const size_t bytes = tensor.values.size() * sizeof(float);
            check(cudaMemcpyAsync(place(input, bytes), tensor.values.data(), bytes,
                                  cudaMemcpyHostToDevice, stream_), "cudaMemcpyAsync");
        }
        Tensors made;
        std::map<std::string, void*> results;
        for (int i = 0; i < graph.engine->getNbIOTensors(); ++i) {
            const char* tensor = graph.engine->getIOTensorName(i);
            if (graph.engine->getTensorIOMode(tensor) != nvinfer1::TensorIOMode::kOUTPUT) continue;
            const nvinfer1::Dims shape = graph.context->getTensorShape(tensor);
            Tensor& result = made[tensor];
            result.shape.assign(shape.d, shape.d + shape.nbDims);
            result.values.resize(count(result.shape));
            results[tensor] = place(tensor, result.values.size() * sizeof(float));
        }
        if (!graph.context->enqueueV3(stream_))
            throw std::runtime_error(name + ": TensorRT can't run the graph; see its log above");
        for (auto& [tensor, result] : made)
            check(cudaMemcpyAsync(result.values.data(), results.at(tensor),
                                  result.values.size() * sizeof(float), cudaMemcpyDeviceToHost,
                                  stream_), "cudaMemcpyAsync");
        check(cudaStreamSynchronize(stream_), "cudaStreamSynchronize");
        return made;
    }

private:
    struct Logger : nvinfer1::ILogger {
        void log(Severity severity, const char* message) noexcept override {
            if (severity <= Severity::kWARNING) std::cerr << message << "\n";
        }
    };
    struct Graph {  // the context goes before its engine
        std::unique_ptr<nvinfer1::ICudaEngine> engine;
        std::unique_ptr<nvinfer1::IExecutionContext> context;
    };

    static nvinfer1::Dims dims(const Shape& shape) {
        nvinfer1::Dims made{};
        made.nbDims = static_cast<int32_t>(shape.size());
        std::copy(shape.begin(), shape.end(), made.d);
        return made;
    }

    // The files of engines that were built together, by graph: for this GPU, system and TensorRT,
    // for single tiles, of the bundle's tile size where there are such, otherwise of the first one.
    std::map<std::string, std::string> chooseEngines(const Json& manifest,
                                                     const cudaDeviceProp& device) {
        const int sm = device.major * 10 + device.minor;
        const std::string gpu = device.name;
        const int library = getInferLibVersion();  // 100900 is 10.9.0
        const std::string version =
            std::to_string(library / 10000) + "." + std::to_string(library / 100 % 100) + ".";
        std::map<fs::path, std::map<std::string, std::string>> sets;  // by folder
        std::map<fs::path, int> tiles;
        for (const Json& engine : manifest.at("engines")) {
            const auto sms = engine.at("sm").get<std::vector<int>>();
            const Json options = engine.value("options", Json::object());
            const bool later = options.value("hardware_compatibility", "") == "ampere-plus";
            const bool fits = std::count(sms.begin(), sms.end(), sm) != 0 || (later && sm >= 80);
            if (!fits || engine.at("target") != "tensorrt" || engine.at("os") != kSystem) continue;
            if (engine.at("version").get<std::string>().rfind(version, 0) != 0) continue;
            if (options.value("gpu", gpu) != gpu) continue;  // kernels are chosen for one model
            const auto file = engine.at("file").get<std::string>();
            const fs::path folder = fs::path(file).parent_path();
            sets[folder][engine.at("graph")] = file;
            if (engine.at("graph") != "encoder") continue;
            const Json& image = engine.at("profile").at("image");  // least, best, largest shape
            if (image.at(0).at(0) == 1) tiles[folder] = image.at(1).at(3);
        }
        const std::map<std::string, std::string>* chosen = nullptr;
        for (const auto& [folder, tile] : tiles) {
            if (sets[folder].size() != manifest.at("graphs").size()) continue;
            if (chosen && manifest.at("image").at("tile_px") != tile) continue;
            chosen = &sets[folder];
            tile_ = tile;
        }
        if (!chosen)
            throw std::runtime_error("the bundle has no engines for single tiles on SM " +
                                     std::to_string(sm) + " (" + gpu + ", " + kSystem +
                                     ") by TensorRT " + version + "x. Build them on this GPU: "
                                     "rcod-export engines BUNDLE --target tensorrt");
        return *chosen;
    }

    void load(const fs::path& file, const std::string& name) {
        std::ifstream stream(file, std::ios::binary);
        const std::string plan((std::istreambuf_iterator<char>(stream)), {});
        Graph& graph = graphs_[name];
        graph.engine.reset(runtime_->deserializeCudaEngine(plan.data(), plan.size()));
        if (!graph.engine)
            throw std::runtime_error(file.string() + ": TensorRT refuses this engine; it is tied "
                                     "to the version and the GPU that it was built for");
        graph.context.reset(graph.engine->createExecutionContext());
        if (!graph.context) throw std::runtime_error(file.string() + ": no execution context");
    }

    Logger logger_;
    std::unique_ptr<nvinfer1::IRuntime> runtime_;
    std::map<std::string, Graph> graphs_;
    cudaStream_t stream_ = nullptr;
    int tile_ = 0;
};

#endif

// -- images ---------------------------------------------------------------------------------------

// Planes of R, G and B, in 0..255.
struct Image {
    int height = 0, width = 0;
    std::vector<float> values;

    Image(int height_, int width_)
        : height(height_), width(width_), values(size_t{3} * height_ * width_) {}
    float* row(int channel, int y) {
        return values.data() + (size_t(channel) * height + y) * width;
    }
    const float* row(int channel, int y) const { return const_cast<Image*>(this)->row(channel, y); }
};

Image readPpm(const fs::path& path) {
    std::ifstream file(path, std::ios::binary);
    std::string magic;
    std::array<int, 3> header{};  // width, height, largest value
    file >> magic;
    for (int& number : header) {
        while (file >> std::ws && file.peek() == '#') file.ignore(1 << 20, '\n');
        file >> number;
    }
    file.ignore(1);
    const auto [width, height, largest] = header;
    if (!file || magic != "P6" || largest != 255 || width < 1 || height < 1 ||
        int64_t{width} * height > 60'000'000)
        throw std::runtime_error(path.string() + ": expected a PPM image (P6, 8 bits)");
    std::vector<unsigned char> pixels(size_t{3} * width * height);
    if (!file.read(reinterpret_cast<char*>(pixels.data()), std::streamsize(pixels.size())))
        throw std::runtime_error(path.string() + ": the image ends too early");
    Image image(height, width);
    for (int y = 0; y < height; ++y)
        for (int x = 0; x < width; ++x)
            for (int c = 0; c < 3; ++c)
                image.row(c, y)[x] = pixels[(size_t(y) * width + x) * 3 + size_t(c)];
    return image;
}

// Written beside its place and moved there whole.
void writePpm(const fs::path& path, const Image& image) {
    std::vector<unsigned char> pixels(image.values.size());
    for (int y = 0; y < image.height; ++y)
        for (int x = 0; x < image.width; ++x)
            for (int c = 0; c < 3; ++c)
                pixels[(size_t(y) * image.width + x) * 3 + size_t(c)] =
                    static_cast<unsigned char>(image.row(c, y)[x]);
    const fs::path partial = path.string() + ".partial";
    std::ofstream file(partial, std::ios::binary);
    file << "P6\n" << image.width << " " << image.height << "\n255\n";
    file.write(reinterpret_cast<const char*>(pixels.data()), std::streamsize(pixels.size()));
    file.close();
    if (!file) {
        fs::remove(partial);
        throw std::runtime_error(path.string() + ": can't be written");
    }
    fs::rename(partial, path);
}

// To a grey level; halves go to the even one, as in the Python runtime.
void roundToPixels(Image& image) {
    for (float& value : image.values) value = std::nearbyint(std::clamp(value, 0.0f, 255.0f));
}

// -- resampling, as Pillow does it ----------------------------------------------------------------

struct Filter {
    double reach;
    double (*at)(double);
};

const Filter kBicubic{2.0, [](double x) {
    const double a = -0.5;
    x = std::abs(x);
    if (x < 1.0) return ((a + 2.0) * x - (a + 3.0)) * x * x + 1.0;
    if (x < 2.0) return (((x - 5.0) * x + 8.0) * x - 4.0) * a;
    return 0.0;
}};
const Filter kBox{0.5, [](double x) { return x > -0.5 && x <= 0.5 ? 1.0 : 0.0; }};

// What one pixel of the result is made of, along one axis.
struct Taps {
    int first;
    std::vector<double> weights;
};

std::vector<Taps> taps(int source, int size, const Filter& filter) {
    const double ratio = double(source) / size, stretch = std::max(1.0, ratio);
    std::vector<Taps> made;
    for (int i = 0; i < size; ++i) {
        const double centre = (i + 0.5) * ratio, reach = filter.reach * stretch;
        const int first = std::max(0, int(centre - reach + 0.5));
        const int end = std::min(source, int(centre + reach + 0.5));
        Taps pixel{first, {}};
        for (int x = first; x < end; ++x)
            pixel.weights.push_back(filter.at((x - centre + 0.5) / stretch));
        const double sum = std::accumulate(pixel.weights.begin(), pixel.weights.end(), 0.0);
        for (double& weight : pixel.weights) weight /= sum;
        made.push_back(std::move(pixel));
    }
    return made;
}

struct Box {
    int top, left, height, width;
};

// A box of the resampled image: rows first make what the box needs, then columns.
Image resample(const Image& image, const std::vector<Taps>& rows, const std::vector<Taps>& columns,
               const Box& box) {
    const int first = rows[size_t(box.top)].first;
    const Taps& last = rows[size_t(box.top + box.height - 1)];
    Image narrow(last.first + int(last.weights.size()) - first, box.width), made(box.height, box.width);
    for (int c = 0; c < 3; ++c) {
        for (int y = 0; y < narrow.height; ++y)
            for (int x = 0; x < box.width; ++x) {
                const Taps& pixel = columns[size_t(box.left + x)];
                const float* from = image.row(c, first + y) + pixel.first;
                double sum = 0.0;
                for (size_t i = 0; i < pixel.weights.size(); ++i) sum += from[i] * pixel.weights[i];
                narrow.row(c, y)[x] = float(sum);
            }
        for (int y = 0; y < box.height; ++y) {
            const Taps& pixel = rows[size_t(box.top + y)];
            for (int x = 0; x < box.width; ++x) {
                double sum = 0.0;
                for (size_t i = 0; i < pixel.weights.size(); ++i)
                    sum += narrow.row(c, pixel.first - first + int(i))[x] * pixel.weights[i];
                made.row(c, y)[x] = float(sum);
            }
        }
    }
    return made;
}

Image resize(const Image& image, int height, int width, const Filter& filter) {
    return resample(image, taps(image.height, height, filter), taps(image.width, width, filter),
                    {0, 0, height, width});
}

// -- tiles ----------------------------------------------------------------------------------------

// Tiles along one axis; the weights of all that cover a pixel sum to one.
struct Axis {
    int tile;
    std::vector<int> starts;
    std::vector<std::vector<float>> weights;  // as many as a tile has pixels inside the image
};

// Tiles start where latents and enlarged pixels lie, as in the training.
constexpr int kGrid = 8;

// Where the last of several tiles starts, in kGrid, and how many there are.
std::pair<int, int> lastAndNumber(int length, int tile, int overlap) {
    const int last = (length - tile + kGrid - 1) / kGrid;
    const int step = std::max(1, (tile - overlap) / kGrid);
    return {last, (last + step - 1) / step + 1};
}

// The least size of as many tiles as `length` needs of `tile`.
int fittingTile(int length, int tile, int overlap, int multiple) {
    if (length <= tile) return tile;
    const int number = lastAndNumber(length, tile, overlap).second;
    const int least = std::max(multiple, 2 * overlap);
    while (tile - multiple >= least &&
           lastAndNumber(length, tile - multiple, overlap).second == number)
        tile -= multiple;
    return tile;
}

// Tiles of `tile` that overlap by at least `overlap`; `fixed`: also where the image is smaller. The
// last of several may reach beyond the image.
Axis planAxis(int length, int tile, int overlap, int multiple, bool fixed) {
    if (length <= tile) {
        const int fitting = (length + multiple - 1) / multiple * multiple;
        return {fixed ? tile : fitting, {0}, {std::vector<float>(size_t(length), 1.0f)}};
    }
    const auto [last, number] = lastAndNumber(length, tile, overlap);
    Axis axis{tile, {}, {}};
    std::vector<std::vector<double>> windows(size_t(number), std::vector<double>(size_t(tile), 1.0));
    for (int i = 0; i < number; ++i)
        axis.starts.push_back(kGrid * int(std::nearbyint(double(i) * last / (number - 1))));
    for (size_t i = 0; i + 1 < windows.size(); ++i) {
        const int shared = axis.starts[i] + tile - axis.starts[i + 1];
        for (int x = 0; x < shared; ++x) {
            const double ramp = 0.5 - 0.5 * std::cos(std::acos(-1.0) * (x + 0.5) / shared);
            windows[i + 1][size_t(x)] *= ramp;
            windows[i][size_t(tile - 1 - x)] *= ramp;
        }
    }
    std::vector<double> total(size_t(axis.starts.back() + tile), 0.0);
    for (size_t i = 0; i < windows.size(); ++i)
        for (int x = 0; x < tile; ++x) total[size_t(axis.starts[i] + x)] += windows[i][size_t(x)];
    for (size_t i = 0; i < windows.size(); ++i) {
        axis.weights.emplace_back();
        for (int x = 0; x < std::min(tile, length - axis.starts[i]); ++x)
            axis.weights[i].push_back(
                float(windows[i][size_t(x)] / total[size_t(axis.starts[i] + x)]));
    }
    return axis;
}

// As (1, 3, height, width) in [-1, 1], mirrored beyond the image's edge.
Tensor toTensor(const Image& image, int height, int width) {
    const auto mirrored = [](int i, int length) {
        const int period = std::max(1, 2 * (length - 1));
        i %= period;
        return i < length ? i : period - i;
    };
    Tensor tensor{{1, 3, height, width}, {}};
    tensor.values.reserve(count(tensor.shape));
    for (int c = 0; c < 3; ++c)
        for (int y = 0; y < height; ++y) {
            const float* row = image.row(c, mirrored(y, image.height));
            for (int x = 0; x < width; ++x)
                tensor.values.push_back(row[mirrored(x, image.width)] / 127.5f - 1.0f);
        }
    return tensor;
}

// -- the pipeline ---------------------------------------------------------------------------------

// Weights of the levels: a level's name, or a number from 0 (the first) to 1 (the last).
Tensor levelWeights(const std::string& realism, const Json& levels) {
    const auto n = int64_t(levels.size());
    Tensor weights{{1, n}, std::vector<float>(size_t(n), 0.0f)};
    for (size_t i = 0; i < levels.size(); ++i)
        if (levels[i].at("name") == realism) {
            weights.values[i] = 1.0f;
            return weights;
        }
    size_t used = 0;
    double value = -1.0;
    try {
        value = std::stod(realism, &used);
    } catch (const std::logic_error&) {
    }
    if (used != realism.size() || !(value >= 0.0 && value <= 1.0))
        throw std::runtime_error("realism " + realism + ": expected a level's name or 0 to 1");
    const double position = value * double(n - 1);
    const auto lower = size_t(std::min<int64_t>(int64_t(position), std::max<int64_t>(0, n - 2)));
    weights.values[lower] = float(1.0 - (position - double(lower)));
    if (n > 1) weights.values[lower + 1] = float(position - double(lower));
    return weights;
}

// What is taken where nobody chose: neutral, otherwise the middle one, which may be the only one.
std::string usualLevel(const Json& levels) {
    for (const Json& level : levels)
        if (level.at("name") == "neutral") return "neutral";
    return levels.at((levels.size() - 1) / 2).at("name");
}

// The mean of each cell of about `side` pixels.
Image cells(const Image& image, double side) {
    const auto number = [&](int length) { return std::max(1, int(std::nearbyint(length / side))); };
    return resize(image, number(image.height), number(image.width), kBox);
}

// The brightness of the image, in all of its channels.
Image luma(const Image& image) {
    Image made(image.height, image.width);
    for (int y = 0; y < image.height; ++y)
        for (int x = 0; x < image.width; ++x) {
            const float value = 0.299f * image.row(0, y)[x] + 0.587f * image.row(1, y)[x] +
                                0.114f * image.row(2, y)[x];
            for (int c = 0; c < 3; ++c) made.row(c, y)[x] = value;
        }
    return made;
}

// Under the kernel 1 2 1 in both directions, the edges repeated.
Image smoothed(const Image& image) {
    Image made(image.height, image.width);
    for (int c = 0; c < 3; ++c)
        for (int y = 0; y < image.height; ++y)
            for (int x = 0; x < image.width; ++x) {
                float sum = 0.0f;
                for (int v = -1; v <= 1; ++v)
                    for (int u = -1; u <= 1; ++u)
                        sum += (v ? 1.0f : 2.0f) * (u ? 1.0f : 2.0f) *
                               image.row(c, std::clamp(y + v, 0, image.height - 1))
                                   [std::clamp(x + u, 0, image.width - 1)];
                made.row(c, y)[x] = sum / 16.0f;
            }
    return made;
}

// The share of each cell's detail that is not noise. Noise is everywhere: the cells with the least
// detail show how much there is; those that are nearly black or white have lost theirs.
Image aboveNoise(const Image& detail, const Image& lq) {
    Image share = detail;
    for (float& value : share.values) value *= value;
    share = cells(share, 12.0);
    const Image brightness = luma(cells(lq, 12.0));
    const size_t all = share.values.size() / 3;  // the channels are the same
    std::vector<float> energies(share.values.begin(), share.values.begin() + long(all)), open;
    for (size_t i = 0; i < all; ++i)
        if (brightness.values[i] >= 12.75f && brightness.values[i] <= 242.25f)
            open.push_back(energies[i]);
    if (double(all - open.size()) / double(all) > 0.9) open = energies;
    std::sort(open.begin(), open.end());
    const double position = 0.05 * double(open.size() - 1);
    const auto below = size_t(position), above = std::min(below + 1, open.size() - 1);
    const double noise =
        2.0 * (open[below] + (position - double(below)) * (open[above] - open[below]));
    for (float& value : share.values)
        value = float(std::max(0.0, 1.0 - noise / std::max(double(value), 1e-6)));
    return share;
}

// What the result, averaged down, lacks of the photo is added: all of it in the low frequencies, and
// in brightness what stands above the noise of the finer detail. The Python runtime's "consistent",
// for results at least twice as large.
void matchColours(Image& sr, const Image& lq) {
    Image missing = lq;
    const Image found = resize(sr, lq.height, lq.width, kBox);
    for (size_t i = 0; i < missing.values.size(); ++i) missing.values[i] -= found.values[i];
    Image wanted = resize(cells(missing, 4.0), lq.height, lq.width, kBicubic);
    for (size_t i = 0; i < missing.values.size(); ++i) missing.values[i] -= wanted.values[i];
    const Image detail = luma(missing), smooth = smoothed(detail);
    const Image share = resize(aboveNoise(detail, lq), lq.height, lq.width, kBicubic);
    for (size_t i = 0; i < wanted.values.size(); ++i)
        wanted.values[i] += std::clamp(share.values[i], 0.0f, 1.0f) *
                            (1.5f * detail.values[i] - 0.75f * smooth.values[i]);
    const Image correction = resize(wanted, sr.height, sr.width, kBicubic);
    for (size_t i = 0; i < sr.values.size(); ++i) sr.values[i] += correction.values[i];
    roundToPixels(sr);
}

Image upscale(Graphs& graphs, const Json& manifest, const Image& lq, const std::string& realism) {
    const Json& contract = manifest.at("image");
    const int scale = contract.at("scale"), multiple = contract.at("size_multiple");
    const int side = contract.at("tokens_px");
    if (scale < 2) throw std::runtime_error("a bundle of scale 1: use the Python runtime");
    const int tile = graphs.tile() ? graphs.tile() : contract.at("tile_px").get<int>();
    const int overlap = std::min(contract.at("overlap_px").get<int>(), tile / 2);
    const Tensor level = levelWeights(realism, manifest.at("levels"));

    const Image thumbnail = resize(lq, side, side, kBicubic);
    const Tensor tokens = graphs.run("vpim", {{"image", toTensor(thumbnail, side, side)}}).at("tokens");
    Image sr(lq.height * scale, lq.width * scale);
    const auto rows = taps(lq.height, sr.height, kBicubic);
    const auto columns = taps(lq.width, sr.width, kBicubic);
    const bool fixed = graphs.tile() != 0;
    Axis y = planAxis(sr.height, tile, overlap, multiple, fixed);
    Axis x = planAxis(sr.width, tile, overlap, multiple, fixed);
    if (graphs.fits()) {  // as many smaller tiles, where that saves a quarter of the work
        const int high = fittingTile(sr.height, tile, overlap, multiple);
        const int wide = fittingTile(sr.width, tile, overlap, multiple);
        const Axis down = planAxis(sr.height, high, overlap, multiple, fixed);
        const Axis across = planAxis(sr.width, wide, overlap, multiple, fixed);
        if (4.0 * down.tile * across.tile <= 3.0 * y.tile * x.tile) y = down, x = across;
    }
    for (size_t i = 0; i < y.starts.size(); ++i)
        for (size_t j = 0; j < x.starts.size(); ++j) {
            const auto &wy = y.weights[i], &wx = x.weights[j];
            const Box box{y.starts[i], x.starts[j], int(wy.size()), int(wx.size())};
            const Image part = resample(lq, rows, columns, box);
            const Tensor image = toTensor(part, y.tile, x.tile);
            const Tensor z_lq = graphs.run("encoder", {{"image", image}}).at("z_lq");
            Tensors feeds{{"z_lq", z_lq}, {"tokens", tokens}};
            if (level.values.size() > 1) feeds["level"] = level;  // one level: nothing to choose
            const Tensor z_sr = graphs.run("denoiser", feeds).at("z_sr");
            const Tensor decoded = graphs.run("decoder", {{"z_sr", z_sr}}).at("image");
            for (int c = 0; c < 3; ++c)
                for (int v = 0; v < box.height; ++v) {
                    const float* from = decoded.values.data() + (size_t(c) * y.tile + v) * x.tile;
                    float* to = sr.row(c, box.top + v) + box.left;
                    for (int u = 0; u < box.width; ++u) {
                        if (!std::isfinite(from[u]))
                            throw std::runtime_error("the decoder gave NaN or infinity");
                        to[u] += (from[u] + 1.0f) * 127.5f * wy[size_t(v)] * wx[size_t(u)];
                    }
                }
        }
    roundToPixels(sr);
    matchColours(sr, lq);
    return sr;
}

int main(int argc, char** argv) try {
    if (argc < 4 || argc > 5) {
        std::cerr << "usage: rcod_upscale BUNDLE in.ppm out.ppm [fidelity|neutral|realism|0..1]\n";
        return 1;
    }
    const fs::path bundle = argv[1];
    std::ifstream file(bundle / "manifest.json");
    if (!file) throw std::runtime_error(bundle.string() + ": no manifest.json; is it a bundle?");
    const Json manifest = Json::parse(file);
    if (manifest.at("version") != 1)
        throw std::runtime_error("manifest.json: expected version 1, found " +
                                 manifest.at("version").dump());
    if (manifest.at("graphs").contains("guide"))
        throw std::runtime_error("a bundle with a guide (rcod-s): use the Python runtime");
    const Image lq = readPpm(argv[2]);
    Graphs graphs(bundle, manifest);
    const std::string realism = argc == 5 ? argv[4] : usualLevel(manifest.at("levels"));
    writePpm(argv[3], upscale(graphs, manifest, lq, realism));
    return 0;
} catch (const std::exception& error) {
    std::cerr << "rcod_upscale: " << error.what() << "\n";
    return 1;
}
