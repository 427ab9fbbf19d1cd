// Toy is what tests run in pods: `toy serve` greets over HTTP, `toy get URL` prints an answer, `toy eat` takes memory
// until it is killed, `toy fail` exits with status 3.
package main

import (
	"fmt"
	"io"
	"log"
	"net/http"
	"os"
	"time"
)

func main() {
	if len(os.Args) < 2 {
		log.Fatal("usage: toy serve | get URL | eat | fail")
	}
	switch os.Args[1] {
	case "serve":
		serve()
	case "get":
		get(os.Args[2])
	case "eat":
		eat()
	case "fail":
		os.Exit(3)
	default:
		log.Fatalf("toy cannot %s", os.Args[1])
	}
}

func serve() {
	host, _ := os.Hostname()
	http.HandleFunc("/", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintf(w, "hello from %s\n", host) })
	log.Print("serving")
	log.Fatal(http.ListenAndServe(":8080", nil))
}

func get(url string) {
	client := http.Client{Timeout: 5 * time.Second}
	answer, err := client.Get(url)
	if err != nil {
		log.Fatal(err)
	}
	defer answer.Body.Close()
	if _, err := io.Copy(os.Stdout, answer.Body); err != nil {
		log.Fatal(err)
	}
}

func eat() {
	var eaten [][]byte
	for {
		bite := make([]byte, 1<<20)
		for i := range bite { // memory counts only once it is written to
			bite[i] = 1
		}
		eaten = append(eaten, bite)
	}
}
