// What examples/cpp/segment.cpp uses of ONNX Runtime's C API, for its test: the library is in the Python wheel, the
// header is not. The places of the functions in the table never change: that is the API's promise.

#pragma once

#include <cstddef>
#include <cstdint>

#define ORT_API_VERSION 18

struct OrtStatus;
struct OrtEnv;
struct OrtSession;
struct OrtSessionOptions;
struct OrtRunOptions;
struct OrtMemoryInfo;
struct OrtAllocator;
struct OrtValue;
struct OrtModelMetadata;
struct OrtTensorTypeAndShapeInfo;

enum OrtLoggingLevel { ORT_LOGGING_LEVEL_ERROR = 3 };
enum OrtAllocatorType { OrtArenaAllocator = 1 };
enum OrtMemType { OrtMemTypeDefault = 0 };
enum ONNXTensorElementDataType { ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8 = 2 };

template <int count>
using Others = void* [count];  // functions that are not used

struct OrtApi {
    Others<2> _0;
    const char* (*GetErrorMessage)(const OrtStatus*);
    OrtStatus* (*CreateEnv)(OrtLoggingLevel, const char* name, OrtEnv**);
    Others<3> _4;
    OrtStatus* (*CreateSession)(const OrtEnv*, const char* path, const OrtSessionOptions*, OrtSession**);
    Others<1> _8;
    OrtStatus* (*Run)(OrtSession*, const OrtRunOptions*, const char* const* input_names, const OrtValue* const* inputs,
                      size_t, const char* const* output_names, size_t, OrtValue** outputs);
    OrtStatus* (*CreateSessionOptions)(OrtSessionOptions**);
    Others<13> _11;
    OrtStatus* (*SetIntraOpNumThreads)(OrtSessionOptions*, int);
    Others<24> _25;
    OrtStatus* (*CreateTensorWithDataAsOrtValue)(const OrtMemoryInfo*, void*, size_t bytes, const int64_t* shape,
                                                 size_t rank, ONNXTensorElementDataType, OrtValue**);
    Others<1> _50;
    OrtStatus* (*GetTensorMutableData)(OrtValue*, void**);
    Others<10> _52;
    OrtStatus* (*GetDimensions)(const OrtTensorTypeAndShapeInfo*, int64_t*, size_t rank);
    Others<2> _63;
    OrtStatus* (*GetTensorTypeAndShape)(const OrtValue*, OrtTensorTypeAndShapeInfo**);
    Others<3> _66;
    OrtStatus* (*CreateCpuMemoryInfo)(OrtAllocatorType, OrtMemType, OrtMemoryInfo**);
    Others<8> _70;
    OrtStatus* (*GetAllocatorWithDefaultOptions)(OrtAllocator**);
    Others<14> _79;
    void (*ReleaseStatus)(OrtStatus*);
    Others<2> _94;
    void (*ReleaseValue)(OrtValue*);
    Others<2> _97;
    void (*ReleaseTensorTypeAndShapeInfo)(OrtTensorTypeAndShapeInfo*);
    Others<11> _100;
    OrtStatus* (*SessionGetModelMetadata)(const OrtSession*, OrtModelMetadata**);
    Others<4> _112;
    OrtStatus* (*ModelMetadataLookupCustomMetadataMap)(const OrtModelMetadata*, OrtAllocator*, const char* key,
                                                       char** value);
};

struct OrtApiBase {
    const OrtApi* (*GetApi)(uint32_t version);
    const char* (*GetVersionString)();
};

extern "C" const OrtApiBase* OrtGetApiBase();
