#pragma once

#include <cstdint>
#include <deque>
#include <initializer_list>
#include <memory>
#include <optional>
#include <vector>

#include "../vmi/deadline.h"
#include "unique_fd.h"
#include "wire.h"

namespace kvmi {

using vmi::Deadline;

/** A piece of an outgoing message. */
struct Bytes {
  const void *data;
  size_t size;

  Bytes(const void *data, size_t size) : data(data), size(size) {}
  template <typename T>
  Bytes(const T &object) : data(&object), size(sizeof object) {}
};

/** An event that a vCPU has raised; the vCPU stands still until it is answered. */
struct Event {
  uint32_t sequence;
  wire::EventCommon common;
  union {
    wire::PageFault pageFault;
    wire::SingleStep singleStep;
    wire::RegisterWrite registerWrite;
  };

  unsigned vcpu() const { return common.vcpu; }
  wire::EventId id() const { return static_cast<wire::EventId>(common.event); }
};

/**
 * The socket to the hypervisor: framing, commands with their replies, and the queue of events that arrive in between.
 * The other side is not trusted. Once it has broken the protocol, left a command unanswered or gone away, the
 * connection is dead and every call fails at once.
 */
class Connection {
 public:
  /** Greets the hypervisor and checks its version; null, with a complaint, if either fails. */
  static std::unique_ptr<Connection> establish(UniqueFd socket, const Deadline &deadline);

  bool alive() const { return alive_; }

  /** From now on events of these vCPUs are accepted. */
  void expectVcpus(uint32_t count) { outstanding_.resize(count); }

  /** Sends a command and waits for its reply, which has to hold at least `reply.size` bytes. */
  bool request(wire::MessageId id, std::initializer_list<Bytes> body, void *reply = nullptr, size_t replySize = 0);

  /** Pauses all vCPUs with one message batch, of which only the end is answered. */
  bool pauseAll();

  /** Lets the vCPU of an event go on. */
  bool answer(unsigned vcpu, wire::EventId event, uint32_t sequence, std::optional<Bytes> specific = std::nullopt);

  /** What a vCPU has raised and nobody has answered yet. */
  const std::optional<Event> &outstanding(unsigned vcpu) const { return outstanding_[vcpu]; }

  /**
   * Waits for an event to be in the queue; takes no more than one off the socket, as libkvmi does. False only if the
   * connection is dead.
   */
  bool awaitEvent(const Deadline &deadline);
  std::optional<Event> nextEvent();
  size_t queuedEvents() const { return events_.size(); }

 private:
  struct Message {
    wire::Header header;
    const uint8_t *body;
  };
  enum class Received { kData, kNothing, kDead };

  explicit Connection(UniqueFd socket);

  bool greet(const Deadline &deadline);
  bool checkVersion(const Deadline &deadline);

  void append(wire::MessageId id, uint32_t sequence, std::initializer_list<Bytes> body);
  bool send();
  bool request(const Deadline &deadline, wire::MessageId id, std::initializer_list<Bytes> body, void *reply,
               size_t replySize);
  bool awaitReply(const Deadline &deadline, wire::MessageId id, uint32_t sequence, void *reply, size_t replySize);
  bool takeReply(const Message &message, void *reply, size_t replySize);

  Received receive(const Deadline &deadline);
  std::optional<Message> nextMessage();
  bool enqueue(const Message &message);
  [[gnu::format(printf, 2, 3)]] bool die(const char *format, ...);

  UniqueFd socket_;
  bool alive_ = true;
  uint32_t sequence_ = 0;
  std::vector<uint8_t> outgoing_;
  std::vector<uint8_t> incoming_;
  size_t head_ = 0;
  size_t tail_ = 0;
  std::deque<Event> events_;
  /** By vCPU. */
  std::vector<std::optional<Event>> outstanding_;
};

}  // namespace kvmi
