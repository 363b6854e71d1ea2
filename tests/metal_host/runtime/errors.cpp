// Errors: gathered, each place once, at most 32.
#include <cstdarg>
#include <cstdio>
#include <cstring>

#include "state.h"

namespace rt {

Session session;
constexpr size_t kMaxErrors = 32;

const char* base_name(const char* file) {
  const char* slash = file ? strrchr(file, '/') : nullptr;
  return slash ? slash + 1 : (file ? file : "?");
}

static std::string place(const msl_builtins& b) {
  char text[160];
  snprintf(text, sizeof text,
           " [threadgroup (%u,%u,%u) thread (%u,%u,%u) simdgroup %u lane %u]", b.threadgroup[0],
           b.threadgroup[1], b.threadgroup[2], b.thread[0], b.thread[1], b.thread[2], b.simdgroup,
           b.lane);
  return text;
}

static bool same_place(const Error& a, const Error& b) {
  if (a.pc != b.pc) return false;
  if (a.pc) return a.message.compare(0, 12, b.message, 0, 12) == 0;
  return a.message.substr(0, a.message.find(" [")) == b.message.substr(0, b.message.find(" ["));
}

void report(Worker* worker, uintptr_t pc, bool fatal, const char* format, ...) {
  char text[800];
  va_list values;
  va_start(values, format);
  vsnprintf(text, sizeof text, format, values);
  va_end(values);
  Error error{text, pc};
  if (worker && worker->current) error.message += place(worker->current->at);
  std::lock_guard<std::mutex> guard(session.mutex);
  bool known = false;
  for (const Error& other : session.errors) known |= same_place(other, error);
  if (!known && session.errors.size() < kMaxErrors) session.errors.push_back(error);
  if (worker && (fatal || session.errors.size() >= kMaxErrors)) worker->fatal = true;
}

// Called once the second store has happened: only now is it known whether it changed the bytes.
void report_pending_store(Worker* worker) {
  PendingStore& store = worker->pending;
  if (!store.on) return;
  store.on = false;
  bool same = !memcmp(reinterpret_cast<void*>(store.at), store.before, store.bytes);
  Lane* lane = worker->current;
  worker->current = nullptr;  // the message names the lane that stored
  report(worker, store.pc, false, "%s%s", same ? "SAME-VALUE " : "", store.message.c_str());
  worker->current = lane;
}

}  // namespace rt

extern "C" void msl_rt_error(const char* message, const char* file, int line) {
  rt::Worker* worker = rt::this_worker();
  if (line)
    rt::report(worker, 0, false, "%s at %s:%d", message, rt::base_name(file), line);
  else
    rt::report(worker, 0, false, "%s: %s", message, file);
}
