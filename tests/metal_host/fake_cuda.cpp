// A driver without a GPU, for tests of the launcher: memory is the host's, and the one kernel that
// it knows adds 1 to each float of its first buffer into its last.  What was called is kept.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>

static std::string calls;
static const char* failing = nullptr;
static int elements, pointers;
static float clock_ms;

static int called(const char* name) {
  calls += std::string(name) + " ";
  return failing && std::strcmp(failing, name) == 0 ? 700 : 0;
}
#define CALL(...) \
  if (int result = called(__func__)) return result

extern "C" {
void fake_set(const char* fails, int num_elements, int num_pointers) {
  failing = fails ? strdup(fails) : nullptr;
  elements = num_elements;
  pointers = num_pointers;
  calls.clear();
}
const char* fake_calls() { return calls.c_str(); }

int cuInit(unsigned) { CALL(); return 0; }
int cuGetErrorName(int, const char** text) { *text = "CUDA_ERROR_PLANTED"; return 0; }
int cuGetErrorString(int, const char** text) { *text = "planted"; return 0; }
int cuDriverGetVersion(int* version) { CALL(); *version = 13050; return 0; }
int cuDeviceGetCount(int* count) { CALL(); *count = 1; return 0; }
int cuDeviceGet(int* device, int) { CALL(); *device = 0; return 0; }
int cuDeviceGetName(char* name, int size, int) {
  CALL();
  std::snprintf(name, size, "no GPU");
  return 0;
}
int cuDeviceGetAttribute(int* value, int which, int) {
  CALL();
  *value = which == 75 ? 9 : which == 76 ? 0 : which == 38 ? 1 << 20 : 4;
  return 0;
}
int cuDevicePrimaryCtxRetain(void** made, int) { CALL(); *made = &calls; return 0; }
int cuCtxSetCurrent(void* context) { CALL(); return context == &calls ? 0 : 201; }
int cuCtxSynchronize() { CALL(); return 0; }
int cuModuleLoadData(void** made, const void* image) {
  CALL();
  *made = &elements;
  return std::memcmp(image, "\x7f" "ELF", 4) ? 200 : 0;
}
int cuModuleGetFunction(void** made, void* module, const char* name) {
  CALL();
  *made = &pointers;
  return module == &elements && !std::strcmp(name, "msl_entry") ? 0 : 500;
}
int cuMemAlloc_v2(uint64_t* made, size_t size) {
  CALL();
  *made = reinterpret_cast<uint64_t>(std::malloc(size));
  return size ? 0 : 1;
}
int cuMemFree_v2(uint64_t at) { CALL(); std::free(reinterpret_cast<void*>(at)); return 0; }
int cuMemcpyHtoD_v2(uint64_t to, const void* from, size_t size) {
  CALL();
  std::memcpy(reinterpret_cast<void*>(to), from, size);
  return 0;
}
int cuMemcpyDtoH_v2(void* to, uint64_t from, size_t size) {
  CALL();
  std::memcpy(to, reinterpret_cast<void*>(from), size);
  return 0;
}
int cuMemsetD8_v2(uint64_t at, unsigned char byte, size_t size) {
  CALL();
  std::memset(reinterpret_cast<void*>(at), byte, size);
  return 0;
}
int cuLaunchKernel(void* function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by,
                   unsigned bz, unsigned shared, void*, void** parameters, void** extra) {
  char shape[96];
  std::snprintf(shape, sizeof shape, "%u,%u,%u/%u,%u,%u+%u ", gx, gy, gz, bx, by, bz, shared);
  CALL();
  calls += shape;
  if (function != &pointers || extra) return 1;
  const float* from = *static_cast<const float**>(parameters[0]);
  float* to = *static_cast<float**>(parameters[pointers - 1]);
  for (int i = 0; i < elements; i++) to[i] = from[i] + 1.0f;
  clock_ms += 0.5f;
  return 0;
}
int cuStreamCreate(void** made, unsigned) { CALL(); *made = &clock_ms; return 0; }
int cuStreamSynchronize(void*) { CALL(); return 0; }
int cuStreamDestroy_v2(void*) { CALL(); return 0; }
int cuStreamBeginCapture_v2(void*, int) { CALL(); return 0; }
int cuStreamEndCapture(void*, void** made) { CALL(); *made = &failing; return 0; }
int cuGraphInstantiateWithFlags(void** made, void* graph, uint64_t) {
  CALL();
  *made = graph;
  return 0;
}
int cuGraphLaunch(void*, void* stream) { CALL(); clock_ms += 3.0f; return stream ? 0 : 400; }
int cuGraphExecDestroy(void*) { CALL(); return 0; }
int cuGraphDestroy(void*) { CALL(); return 0; }
int cuEventCreate(void** made, unsigned) { CALL(); *made = new float(0); return 0; }
int cuEventRecord(void* event, void*) { CALL(); *static_cast<float*>(event) = clock_ms; return 0; }
int cuEventElapsedTime(float* passed, void* from, void* to) {
  CALL();
  *passed = *static_cast<float*>(to) - *static_cast<float*>(from);
  return 0;
}
int cuEventDestroy_v2(void* event) { CALL(); delete static_cast<float*>(event); return 0; }
}
