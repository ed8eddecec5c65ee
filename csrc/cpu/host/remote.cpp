// This side of remote.h: a table of kernels each of which asks the other process.
#include "remote.h"

#include <fcntl.h>
#include <omp.h>
#include <signal.h>
#include <spawn.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <mutex>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "kernels.h"

#define BERTFAST_STRING_(x) #x
#define BERTFAST_STRING(x) BERTFAST_STRING_(x)

extern char** environ;

namespace bertfast::BERTFAST_ISA {
namespace {

using isa::RemoteCall;
using isa::RemoteReply;

std::vector<std::pair<uint64_t, uint64_t>> mapped(const std::string& process) {
  std::vector<std::pair<uint64_t, uint64_t>> found;
  std::ifstream maps("/proc/" + process + "/maps");
  for (std::string line; std::getline(maps, line);) {
    uint64_t begin = 0, end = 0;
    if (std::sscanf(line.c_str(), "%lx-%lx", &begin, &end) == 2 && begin >> 47 == 0)
      found.emplace_back(begin, end);
  }
  return found;
}

bool apart(const std::string& process) {
  for (const auto& [begin, end] : mapped(process))
    for (const auto& [from, to] : mapped("self"))
      if (begin < to && from < end) return false;
  return true;
}

// The process: BERTFAST_GUEST is its command. It ends when this one does.
class Guest {
 public:
  Guest() {
    const char* command = std::getenv("BERTFAST_GUEST");
    if (!command)
      throw std::runtime_error("BERTFAST_GUEST is not set, expected the command of a process");
    prctl(PR_SET_PTRACER, PR_SET_PTRACER_ANY, 0, 0, 0);  // it reads and writes memory here
    // Addresses are random, so that it rarely stands where this process does.
    for (int tries = 0; tries < 20; ++tries) {
      start(command);
      RemoteReply ready;
      if (!take(&ready, sizeof ready)) throw std::runtime_error("BERTFAST_GUEST did not start");
      if (apart(std::to_string(process_))) return;
      stop();
    }
    throw std::runtime_error("BERTFAST_GUEST always stands at addresses that are taken here");
  }

  int64_t call(const RemoteCall& request) {
    const std::lock_guard<std::mutex> one(mutex_);
    RemoteReply reply;
    if (write(to_, &request, sizeof request) != sizeof request || !take(&reply, sizeof reply))
      throw std::runtime_error("BERTFAST_GUEST ended in a kernel");
    if (reply.error[0]) throw std::runtime_error(reply.error);
    return reply.value;
  }

 private:
  void start(const char* command) {
    int down[2], up[2];
    if (pipe2(down, O_CLOEXEC) || pipe2(up, O_CLOEXEC)) throw std::runtime_error("no pipe");
    const std::string line = "exec " + std::string(command);
    const char* words[] = {"sh", "-c", line.c_str(), nullptr};
    posix_spawn_file_actions_t actions;
    posix_spawn_file_actions_init(&actions);
    posix_spawn_file_actions_adddup2(&actions, down[0], 0);
    posix_spawn_file_actions_adddup2(&actions, up[1], 1);
    const int error =
        posix_spawn(&process_, "/bin/sh", &actions, nullptr, const_cast<char**>(words), environ);
    posix_spawn_file_actions_destroy(&actions);
    close(down[0]), close(up[1]);
    to_ = down[1], from_ = up[0];
    if (error) throw std::runtime_error("BERTFAST_GUEST can't be run: " + line);
  }
  void stop() {
    kill(process_, SIGKILL);
    waitpid(process_, nullptr, 0);
    close(to_), close(from_);
  }
  bool take(void* to, size_t size) const {
    for (size_t done = 0; done < size;) {
      const ssize_t n = read(from_, static_cast<char*>(to) + done, size - done);
      if (n <= 0) return false;
      done += n;
    }
    return true;
  }

  pid_t process_;
  int to_, from_;
  std::mutex mutex_;
};

Guest& guest() {
  static Guest one;
  return one;
}

template <class T>
int64_t word(const T& value) {
  if constexpr (std::is_pointer_v<T>)
    return reinterpret_cast<int64_t>(value);
  else if constexpr (std::is_class_v<T>)
    return reinterpret_cast<int64_t>(&value);
  else
    return int64_t(value);
}

template <int function, class F>
struct Forward;
template <int function, class R, class... A>
struct Forward<function, R (*)(A...)> {
  static R call(A... arguments) {
    const int64_t value = guest().call({function, omp_get_max_threads(), {word(arguments)...}});
    if constexpr (!std::is_void_v<R>) return R(value);
  }
};

#define BERTFAST_FORWARD(function, member) Forward<function, decltype(Kernels::member)>::call

}  // namespace

extern const Kernels table;
const Kernels table = {
    BERTFAST_STRING(BERTFAST_ISA),
    BERTFAST_STRING(BERTFAST_ISA) == std::string("neon_bf16"),
    false,
    BERTFAST_FORWARD(0, gemm),
    BERTFAST_FORWARD(1, activation_backward),
    BERTFAST_FORWARD(2, attention),
    BERTFAST_FORWARD(3, attention_backward),
    BERTFAST_FORWARD(4, add_layer_norm),
    BERTFAST_FORWARD(5, add_layer_norm_backward),
    BERTFAST_FORWARD(6, gated_act),
    BERTFAST_FORWARD(7, gated_act_backward),
    BERTFAST_FORWARD(8, rotary),
    BERTFAST_FORWARD(9, embedding_layer_norm),
    BERTFAST_FORWARD(10, embedding_layer_norm_backward),
    BERTFAST_FORWARD(11, scatter_add),
    BERTFAST_FORWARD(12, cross_entropy_rows),
    BERTFAST_FORWARD(13, gather_rows),
    BERTFAST_FORWARD(14, scatter_rows),
    BERTFAST_FORWARD(15, packed_bytes),
    BERTFAST_FORWARD(16, qkv_precision),
    BERTFAST_FORWARD(17, pack_weights),
    BERTFAST_FORWARD(18, encoder),
    BERTFAST_FORWARD(19, decode),
    [](Precision) -> double { throw std::invalid_argument("speed means nothing here"); },
};

}  // namespace bertfast::BERTFAST_ISA
