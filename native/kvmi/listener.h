#pragma once

#include <optional>
#include <string>

#include "../vmi/deadline.h"
#include "unique_fd.h"

namespace kvmi {

using vmi::Deadline;

/** The unix socket on which the hypervisor connects. It is taken away again with the listener. */
class Listener {
 public:
  /** Nothing, with a complaint, if the path cannot be used. */
  static std::optional<Listener> open(const char *path);

  Listener(Listener &&) = default;
  ~Listener();

  /** The next connection; an invalid descriptor when the deadline has passed. */
  UniqueFd accept(const Deadline &deadline);

 private:
  Listener(UniqueFd socket, std::string path) : socket_(std::move(socket)), path_(std::move(path)) {}

  UniqueFd socket_;
  std::string path_;
};

}  // namespace kvmi
